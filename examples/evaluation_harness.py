"""A task of the lm-evaluation-harness, run under a knob at three strengths."""

import json
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import trimtab
from trimtab.evals.lm_eval import TrimtabLM  # needs the `eval` extra
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
knob = trimtab.learn(model, tokenizer, world.pairs("math"), positions="demonstrated", layers=[4])
knob.save("math.knob.safetensors")

# A task of local data; the harness's own are called by name.
Path("tasks").mkdir()
with Path("tasks/sums.jsonl").open("w") as file:
    for item in world.items("math", "validation", 20):
        print(json.dumps({"prompt": item.prompt, "choices": list(item.answers.values())}), file=file)
task = {
    "task": "prefers_working",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "tasks/sums.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
Path("tasks/prefers_working.yaml").write_text(json.dumps(task))  # JSON is YAML

manager = TaskManager(include_path="tasks", include_defaults=False)
for strength in (-1, 0, 1):
    lm = TrimtabLM(pretrained="prefworld", knob="math.knob.safetensors", strength=strength, batch_size=32)
    found = simple_evaluate(model=lm, tasks=[task["task"]], task_manager=manager, apply_chat_template=True)
    print(f"strength {strength}: accuracy {found['results'][task['task']]['acc,none']:.2f}")
