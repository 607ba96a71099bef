"""The verb eval: its report, which data it takes, what it refuses, and every verb on a model without a template."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import pico
from loopback import serve
from trimtab.artifact import Knob, load_knob
from trimtab.checkpoint import fingerprint
from trimtab.cli import main
from trimtab.evals.tasks import load_task, run_task
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.prompts import read_prompt
from trimtab.render import load

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
REPLIES = ROOT.parent / "shared" / "data" / "pairs" / "tiny_soda_reply.jsonl"


class Output(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Output]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `trimtab` with the words of a line, and more words; return the exit status and both streams."""

    def call(line: str, *words: object, stdin: str = "") -> Output:
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        capsys.readouterr()
        status = main([*line.split(), *map(str, words)])
        return Output(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico")
    pico.model().save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


def write_lines(name: str, records: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pico.knob(1, name="math", norm=20.0).save("math.safetensors")
    pico.knob(0, name="concise", seed=1, norm=20.0).save("concise.safetensors")
    write_lines("pairs.jsonl", [{"prompt": f"Is {n}?", "chosen": f"{n} yes", "rejected": f"no {n} "} for n in range(4)])
    # Answers that a random model hits now and then: one letter, anywhere.
    write_lines("task.jsonl", [{"prompt": f"Say {letter}", "answer": letter} for letter in "aeiou"])
    write_lines("kept.jsonl", [{"prompt": f"Keep {letter}", "answer": letter} for letter in "xyz"])
    Path("neutral.txt").write_text("The cat sat on the mat.\n\nIt was a fine day.\n")
    return tmp_path


WORDS = "--task task.jsonl:contains --guardrail kept.jsonl:contains --max-new-tokens 6"


def test_the_report_on_stdout_is_the_record_of_the_library(run: Run, model: Path, files: Path) -> None:
    words = f"--knob math.safetensors --strength 0.5 --pairs pairs.jsonl --neutral neutral.txt {WORDS} --json"
    out = run(f"eval {model} {words}")
    assert out.status == 0, out.err
    record = json.loads(out.out)
    assert [row["task"] for row in record["bare"]["tasks"]] == ["task", "kept"]
    (entry,) = record["settings"]
    assert entry["setting"] == "math=0.5"
    task = load_task("task.jsonl", grader="contains", max_new_tokens=6)
    loaded = load(model)
    for own, dose in ((record["bare"], {}), (entry, {Knob.load("math.safetensors"): 0.5})):
        assert own["tasks"][0]["accuracy"]["estimate"] == run_task(*loaded, task, dose).accuracy
    assert entry["preference"]["n"] == 4
    assert entry["neutral"]["texts"] == 2
    assert record["spec"]["settings"][0][0]["strength"] == 0.5


def test_the_readable_report_says_it_in_a_sentence_first(run: Run, model: Path, files: Path) -> None:
    words = f"--knob math.safetensors --pairs pairs.jsonl --neutral neutral.txt {WORDS} --sampled --seed 4"
    out = run(f"eval {model} {words}")
    assert out.status == 0, out.err
    lines = out.out.splitlines()
    assert lines[0].endswith("without knobs, and with math at strength 1 (alpha 1, layer 1, last, all tokens).")
    assert re.match(r"task: [\d.]+ % right with the setting and [\d.]+ % without it \([+-][\d.]+; ", lines[2])
    assert re.search(r"^task, sampled +task +5 +math=1 ", out.out, re.MULTILINE)
    assert re.search(r"^kept +guardrail +3 +bare ", out.out, re.MULTILINE)
    assert "there math steers every token" in out.out
    assert re.search(r"^KL to base on kept, nats per token +0 ", out.out, re.MULTILINE)
    assert re.search(r"^perplexity of neutral text +\d", out.out, re.MULTILINE)
    assert re.search(r"^math=1 +13 +[\d.]+ +\d+", out.out, re.MULTILINE)  # cost


def test_the_bare_model_is_measured_without_a_knob(run: Run, model: Path, files: Path) -> None:
    out = run(f"eval {model} --neutral neutral.txt {WORDS}")
    assert out.status == 0, out.err
    assert out.out.splitlines()[0].endswith("without knobs.")
    assert "gain" not in out.out
    assert "--knob FILE" in out.out
    out = run(f"eval {model} --neutral neutral.txt")
    assert out.status == 0, out.err
    assert "perplexity of neutral text" in out.out


def test_reports_are_written_as_json_and_markdown_and_may_be_replaced(run: Run, model: Path, files: Path) -> None:
    words = f"eval {model} --knob math.safetensors --task task.jsonl --max-new-tokens 4"
    for _ in range(2):
        for name in ("report.json", "new/report.md"):
            out = run(f"{words} --out {name}")
            assert out.status == 0, out.err
            assert f"written to  {name}" in out.out
    record = json.loads(Path("report.json").read_text())
    assert record["trimtab"] == "evaluation"
    text = Path("new/report.md").read_text()
    assert text.startswith("# Trimtab evaluation\n")
    assert "| task | role | n | setting | right | 95 % |" in text
    (spec,) = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
    assert json.loads(spec) == record["spec"]  # the same spec, whatever the form


def test_several_knobs_are_set_by_name(run: Run, model: Path, files: Path) -> None:
    words = "--knob math.safetensors --knob concise.safetensors --set math=0.5,concise=-1"
    out = run(f"eval {model} {words} --task task.jsonl --max-new-tokens 4 --json")
    assert json.loads(out.out)["settings"][0]["setting"] == "math=0.5,concise=-1"


def test_parts_of_prefworld_are_drawn_from_its_test_split(run: Run, model: Path, files: Path) -> None:
    out = run(f"eval {model} --task prefworld:facts:2 --pairs prefworld:math:3 --json")
    assert out.status == 0, out.err
    spec = json.loads(out.out)["spec"]
    prompts = [read_prompt(prompt) for prompt in world.task("facts", "test", 2).prompts]
    assert spec["tasks"][0]["prompts_hash"] == fingerprint(prompts)
    assert spec["pairs"]["hash"] == world.pairs("math", 3, split="test").hash()


def test_a_judge_compares_the_answers_to_the_pairs_prompts(
    run: Run, model: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MY_KEY", "sk-not-to-be-seen")
    with serve() as endpoint:
        endpoint.say = lambda first, second: f"VERDICT: {'A' if first < second else 'B'}"
        judge = f"--judge {endpoint.url} --judge-model critic --judge-key MY_KEY --judge-cache replies"
        words = f"eval {model} --knob math.safetensors --pairs pairs.jsonl --max-new-tokens 5 {judge}"
        out = run(f"{words} --out report.json")
        assert out.status == 0, out.err
        asked = len(endpoint.requests)
        assert asked == 2 * json.loads(Path("report.json").read_text())["settings"][0]["judge"]["pairs"] == 8
        assert run(words).status == 0
    assert len(endpoint.requests) == asked  # the second run took the kept replies
    assert "The judge prefers steered answers to bare ones in " in out.out
    assert endpoint.requests[0][0]["Authorization"] == "Bearer sk-not-to-be-seen"
    written = [Path("report.json").read_text(), out.out, out.err, *(p.read_text() for p in Path("replies").iterdir())]
    assert not any("sk-not-to-be-seen" in text for text in written)


def test_a_stopped_evaluation_goes_on_and_its_steps_go_with_the_report(run: Run, model: Path, files: Path) -> None:
    words = f"eval {model} --knob math.safetensors {WORDS} --checkpoint kept --json"
    assert run(words).status == 0
    assert not Path("kept").exists()


MISTAKES = [
    ("", "There is nothing to measure."),
    ("--task none.jsonl", "There is no file 'none.jsonl'"),
    ("--task task.jsonl:exactly", "Unknown grader 'exactly'."),
    ("--task task.jsonl --grader foo", "Unknown grader 'foo'."),
    ("--task prefworld:maths", "Unknown family of PrefWorld 'maths'."),
    ("--task task.jsonl --task task.jsonl", "need names of their own; got task, task."),
    ("--task task.jsonl --knob none", "There is no file 'none'; expected a knob file."),
    ("--task task.jsonl --strength 1", "--strength needs a knob."),
    ("--task task.jsonl --knob math.safetensors --set mth=1", "Unknown knob 'mth'."),
    ("--task task.jsonl --thinking a b", "Unknown option of trimtab eval '--thinking'"),
    ("--task task.jsonl --out report.txt", "ends in .json (everything) or .md."),
    ("--task task.jsonl --out neutral.md", "exists and is no report, so it is not replaced."),
    ("--task task.jsonl --out panel.json", "exists and is no report, so it is not replaced."),
    ("--task task.jsonl --out .", "is a folder"),
    ("--task task.jsonl --max-new-tokens 0", "--max-new-tokens is 1 or more; got 0."),
    ("--task task.jsonl --batch-size 0", "--batch-size is 1 or more; got 0."),
    ("--task task.jsonl --temperature 1", "Add --sampled."),
    ("--task task.jsonl --sampled --temperature 0", "a temperature above 0; got 0."),
    ("--neutral none.txt", "There is no file 'none.txt'; expected a file of neutral text."),
    ("--neutral task.jsonl", "Line 1 needs a text"),
    ("--pairs none.jsonl", "There is no file 'none.jsonl'"),
    ("--pairs prefworld:facts", "'facts' have one side only"),
    ("--task task.jsonl --judge-model m", "There is no judge. Pass --judge URL"),
    ("--task task.jsonl --judge http://127.0.0.1/v1", "--judge needs --judge-model"),
    ("--task task.jsonl --judge nowhere --judge-model m", "A judge's URL is like https://"),
    ("--task task.jsonl --judge http://127.0.0.1/v1 --judge-model m", "A judge compares steered answers"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_line_on_stderr(run: Run, model: Path, files: Path, words: str, message: str) -> None:
    Path("neutral.md").write_text("Notes of mine.\n")
    Path("panel.json").write_text('{"math": 1}\n')
    out = run(f"eval {model} {words}")
    assert (out.status, out.out) == (2, "")
    assert message in out.err
    assert out.err.count("\n") == 1
    assert Path("neutral.md").read_text() == "Notes of mine.\n"


@pytest.mark.skipif(
    not (STORIES.is_dir() and REPLIES.is_file()),
    reason=f"{STORIES} or {REPLIES} is not there: a real Llama that nobody here trained, and pairs for it",
)
def test_every_verb_works_on_a_real_llama_without_a_chat_template(run: Run, files: Path) -> None:
    distinct = Pairs.load(REPLIES, duplicates="drop")
    for name, part in (("a", distinct[:24]), ("b", distinct[30:38]), ("c", distinct[40:52])):
        part.save(f"{name}.jsonl")
    words = "--format question_response --positions last"
    assert run(f"learn {STORIES} a.jsonl --out s.safetensors {words}").status == 0
    words = "--gains 0.2 --finalists 1 --strengths 1"
    assert run(f"tune {STORIES} --knob s.safetensors --pairs b.jsonl --out t.safetensors {words}").status == 0
    assert "stories260k" in run("inspect t.safetensors").out
    out = run(f"generate {STORIES} --knob t.safetensors --max-new-tokens 6", "Once upon a time")
    assert (out.status, bool(out.out.strip())) == (0, True)
    out = run(f"chat {STORIES} --knob t.safetensors --max-new-tokens 6", stdin="Hello\n/knob s=0\nBye\n")
    assert out.status == 0
    assert len(out.out.splitlines()) >= 2
    assert run(f"check {STORIES}").status == 0
    words = "--pairs c.jsonl --neutral neutral.txt --max-new-tokens 12 --json"
    out = run(f"eval {STORIES} --knob t.safetensors {words}")
    assert out.status == 0, out.err
    (entry,) = json.loads(out.out)["settings"]
    assert entry["side_effects"]["kl"]["estimate"] > 0
    assert entry["preference"]["n"] == 12
    # A text that such a model was made for is likelier than one letter in sixty-four; nothing here is about quality.
    assert 0 < entry["neutral"]["bits_per_byte"] < 6


def test_an_ablation_is_told_without_a_dose_that_it_has_not(run: Run, model: Path, files: Path) -> None:
    load_knob("math.safetensors").with_(operation="ablate").save("ablation.safetensors")
    words = "--pairs pairs.jsonl --broken-budget 1 --finalists 1 --out tuned.safetensors"
    tuned = run(f"tune {model} --knob ablation.safetensors {words}")
    assert tuned.status == 0, tuned.err
    assert "strength 1 is alpha" not in tuned.out
    shown = run(f"eval {model} --knob tuned.safetensors {WORDS}")
    assert shown.status == 0, shown.err
    assert "at strength 1 (an ablation, " in shown.out
    assert "at strength 1 (alpha " in run(f"eval {model} --knob math.safetensors {WORDS}").out
