"""The plugin inside vLLM, in an environment of its own: `make test-engines`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import crowd
import load
import pytest
import rows

import pico

pytestmark = pytest.mark.engines

if not rows.find_spec("vllm"):
    pytest.skip("vLLM is not installed here", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("engines")
    load.save(place, load.model(), load.rack())
    return place


@pytest.fixture(scope="module")
def wanted() -> list[load.Answer]:
    return load.reference(load.model(), load.rack(), load.requests())


def run_script(folder: Path, text: str, **variables: str) -> str:
    """Run a program beside vLLM, and return what it has printed."""
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path[:0] = {[str(rows.HERE), str(rows.HERE.parent)]}\n{text}")
    own = rows.environment(folder, {**rows.IN_PROCESS, **variables})
    done = subprocess.run(
        [sys.executable, str(script)], env=own, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_reference_tells_every_setting_from_none(wanted: list[load.Answer]) -> None:
    plain = [load.Request(request.ids, {}) for request in load.requests()]
    unsteered = load.reference(load.model(), load.rack(), plain)
    assert [a.tokens != b.tokens for a, b in zip(wanted, unsteered, strict=True)] == [
        bool(r.knobs) for r in load.requests()
    ]


@pytest.mark.parametrize("name", rows.ROWS)
def test_an_engine_says_what_transformers_says(name: str, folder: Path, wanted: list[load.Answer]) -> None:
    found = rows.run(name, folder)
    if found is None:
        pytest.skip("for another device")
    answers, facts = found
    equal, gap = load.compare(answers, wanted[: len(answers)])
    assert len(answers) == len(load.requests(weights=rows.ROWS[name].weights))
    assert equal == len(answers)
    assert gap < load.TOLERANCE
    if name == "v2":
        assert facts["runner"] == "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
    if name == "in-process":
        assert facts["runner"] == "vllm.v1.worker.cpu_model_runner.CPUModelRunner"


@pytest.mark.parametrize("name", crowd.CROWDS)
def test_a_crowd_is_answered_as_if_each_were_alone(name: str, folder: Path) -> None:
    engine = crowd.CROWDS[name]
    found = crowd.run(name, folder)
    if found is None:
        pytest.skip("for another device")
    alone = load.reference(load.model(), load.rack(), load.stress_requests(weights=engine.weights))
    answers, counted = found
    equal, gap = load.compare(answers, alone)
    assert counted["preemptions"] > 0
    assert counted["hits"] > 0
    if engine.key:
        assert equal == len(alone) == 40
        assert gap < load.TOLERANCE
    else:  # blocks that were computed under other knobs are read, and nothing says so
        assert equal < 40


MIXED_UP = """
import load, rows
from pathlib import Path
from trimtab.engines.vllm import compat
if __name__ == "__main__":
    compat.mixes_up_adapters = lambda: False
    row = rows.ROWS["in-process"]
    rows.SIZES["max_loras"] = 3
    answers, _ = rows.answer_offline(Path(FOLDER), row)
    wanted = load.reference(load.model(), load.rack(), load.requests())
    print("EQUAL", load.compare(answers, wanted)[0])
"""


def test_without_our_care_this_vllm_gives_an_adapter_to_requests_that_have_none(folder: Path) -> None:
    said = run_script(folder, MIXED_UP.replace("FOLDER", repr(str(folder))))
    assert int(said.rsplit("EQUAL", 1)[1]) < len(load.requests())


MOVED = """
import importlib
from vllm.plugins import load_general_plugins
module, _, name = SEAM.rpartition(":")
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
delattr(owner, last)
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
if __name__ == "__main__":
    options = {"model": MODEL, "dtype": "float32", "max_model_len": 64}
    print("WITHOUT KNOBS", EngineArgs(**options).create_engine_config().model_config.max_model_len)
    try:
        EngineArgs(**options, additional_config={"trimtab": {}}).create_engine_config()
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "seam",
    [
        "vllm.v1.core.kv_cache_utils:_gen_prompt_embeds_extra_hash_keys",
        "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    ],
)
def test_a_seam_that_moved_is_refused_at_start_by_version_and_name(seam: str, folder: Path) -> None:
    said = run_script(folder, MOVED.replace("SEAM", repr(seam)).replace("MODEL", repr(str(folder / "model"))))
    assert "WITHOUT KNOBS 64" in said
    assert "AdapterError Trimtab's plugin does not fit vLLM 0." in said
    assert seam.replace(":", ".") in said


REFUSED_STARTS = """
from vllm.engine.arg_utils import EngineArgs
if __name__ == "__main__":
    for settings in SETTINGS:
        options = {"model": MODEL, "dtype": "float32", "max_model_len": 64, "additional_config": {"trimtab": settings}}
        try:
            EngineArgs(**options, **MORE).create_engine_config()
        except Exception as error:
            print(type(error).__name__, error)
        else:
            print("STARTED")
"""


def start(folder: Path, *settings: dict[str, Any], **options: Any) -> list[str]:
    """Try to start engines, and return what each says."""
    text = REFUSED_STARTS.replace("SETTINGS", repr(list(settings))).replace("MODEL", repr(str(folder / "model")))
    return run_script(folder, text.replace("MORE", repr(options))).strip().splitlines()


def test_an_engine_is_refused_what_it_cannot_run(folder: Path) -> None:
    wide, dense = folder / "wide.knob.safetensors", folder / "dense.knob.safetensors"
    pico.knob(1, name="wide", width=64).save(wide)
    load.weight_knob("dense", 1).dense_copy().save(dense)
    kernel, polite = folder / "kernel.knob.safetensors", str(folder / "polite.knob.safetensors")
    pico.knob(1, name="kernel", width=load.WIDTH, operation="kernel").save(kernel)
    alpha = str(folder / "alpha.knob.safetensors")
    said = start(
        folder,
        {"knobs": {"wide": str(wide)}},
        {"knobs": {"dense": str(dense)}},
        {"knobs": {"kernel": str(kernel)}},
        {"knobs": {"gone": str(folder / "gone")}},
        {"knobs": {"alpha": alpha}, "layers": [2]},
        {"knobs": {"polite": polite}},
        {"knbs": {}},
        {"knobs": {"a b": alpha}},
        {"knobs": {"alpha": alpha}},
    )
    for line, words in zip(
        said,
        (
            "KnobError Knob 'wide' has width 64",
            "KnobError Knob 'dense' is a dense difference",
            "KnobError Knob 'kernel' (kernel)",
            "KnobError Cannot load a knob",
            "KnobError Knob 'alpha' acts on layer 1",
            "KnobError Knob 'polite' changes weights, and this engine runs without adapters",
            "UnknownName Unknown setting",
            "KnobError A knob's name",
            "STARTED",
        ),
        strict=True,
    ):
        assert line.startswith(words), line
    assert start(folder, {"knobs": {"polite": polite}}, enable_lora=True, max_lora_rank=8)[-1] == "STARTED"


# A server


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    row = replace(rows.ROWS["server"], options={**rows.EAGER, "enable_prefix_caching": True, "block_size": 32})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rows.environment(folder, {}).items():
            patch.setenv(name, value)
        with rows.served(folder, row, "--allow-loading") as place:
            yield place


def body(folder: Path, ids: list[int], **more: Any) -> dict[str, Any]:
    greedy = {"max_tokens": load.NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": str(folder / "model"), "prompt": ids, **greedy, **more}


def tokens(address: str, folder: Path, ids: list[int], **more: Any) -> list[int]:
    status, content = rows.post(f"{address}/v1/completions", body(folder, ids, **more))
    assert status == 200, content
    return content["choices"][0]["token_ids"]


def test_a_bad_request_is_a_400_and_the_engine_lives_on(address: str, folder: Path, wanted: list[load.Answer]) -> None:
    ids = load.requests()[1].ids
    for more, word in (
        ({"knobs": {"alhpa": 1}}, "Did you mean 'alpha'?"),
        ({"knobs": {"alpha": "much"}}, "must be a number"),
        ({"knobs": "alpha=nan"}, "must be finite"),
        ({"knobs": "alpha=1e300"}, "too large"),
        ({"knobs": ["alpha"]}, "are written"),
        ({"knobs": "alpha"}, "name=strength"),
        ({"knobs": {"polite": 1e39}}, "too large"),
        ({"knobs": {"alpha": 1}, "use_beam_search": True}, "Beam search"),
        ({"knobs": {"alpha": 1}, "vllm_xargs": {"knobs": "beta=1"}}, "either in it or beside it"),
        ({"vllm_xargs": {"trimtab": "forged"}}, "not for requests to pass"),
        ({"vllm_xargs": {"knobs": "gamma=1"}}, "Unknown knob"),
    ):
        status, content = rows.post(f"{address}/v1/completions", body(folder, ids, **more))
        assert status == 400, (more, content)
        assert word in json.dumps(content), (more, content)
    status, content = rows.post(f"{address}/tokenize", {"prompt": "a", "knobs": {"alpha": 1}})
    assert status == 400
    assert "takes no 'knobs'" in json.dumps(content)
    assert tokens(address, folder, ids, knobs={"alpha": 1.0}) == wanted[1].tokens
    assert tokens(address, folder, ids, vllm_xargs={"knobs": "alpha=1"}) == wanted[1].tokens
    assert tokens(address, folder, ids, knobs='{"alpha": 1}') == wanted[1].tokens


def test_a_wrong_knob_is_a_400_before_a_stream_begins(address: str, folder: Path) -> None:
    ids = load.requests()[1].ids
    status, content = rows.post(f"{address}/v1/completions", body(folder, ids, knobs={"zz": 1}, stream=True))
    assert status == 400
    assert "Unknown knob 'zz'" in json.dumps(content)


def test_several_answers_to_a_prompt_take_its_knobs(address: str, folder: Path, wanted: list[load.Answer]) -> None:
    asked = body(folder, load.requests()[1].ids, knobs={"alpha": 1.0}, n=2, temperature=1e-4)
    status, content = rows.post(f"{address}/v1/completions", asked)
    assert status == 200, content
    assert [choice["token_ids"] for choice in content["choices"]] == [wanted[1].tokens] * 2


def test_a_name_that_is_given_to_another_knob_serves_no_stale_block(address: str, folder: Path) -> None:
    ids = pico.prompts([100], seed=9)[0]
    old, new = (pico.knob(1, name="mood", seed=s, width=load.WIDTH, norm=12.0) for s in (31, 32))
    for number, knob in enumerate((old, new)):
        path = folder / f"mood{number}.knob.safetensors"
        knob.save(path)
        status, content = rows.post(f"{address}/v1/knobs", {"name": "mood", "path": str(path)})
        assert status == 200, content
        assert "mood" in [entry["id"] for entry in content["data"]]
        alone = load.reference(load.model(), load.Rack(mood=knob), [load.Request(ids, {"mood": 1.0})])[0]
        for _ in range(2):  # the second time from the cache
            assert tokens(address, folder, ids, knobs={"mood": 1.0}) == alone.tokens


def test_a_knob_that_cannot_be_loaded_leaves_the_engine_as_it_was(address: str, folder: Path) -> None:
    wide = folder / "wide.knob.safetensors"
    pico.knob(1, name="wide", width=64).save(wide)
    for order, word in (
        ({"name": "alpha", "path": str(wide)}, "has width 64"),
        ({"name": "alpha", "path": str(folder / "gone")}, "Cannot load"),
        ({"name": "a b", "path": str(folder / "alpha.knob.safetensors")}, "A knob's name"),
        ({"name": "alpha"}, "A knob is loaded by"),
    ):
        status, content = rows.post(f"{address}/v1/knobs", order)
        assert status == 400, content
        assert word in json.dumps(content), content
    ids = load.requests()[1].ids
    alone = load.reference(load.model(), load.rack(), [load.Request(ids, {"alpha": -1.0})])[0]
    assert tokens(address, folder, ids, knobs={"alpha": -1.0}) == alone.tokens


# The command line


def test_generate_says_the_same_with_either_engine(folder: Path, tmp_path: Path) -> None:
    from trimtab.cli import main

    knob = tmp_path / "concise.knob.safetensors"
    assert main(["learn", "prefworld", "prefworld:concise:40", "--out", str(knob)]) == 0
    lines = tmp_path / "prompts.jsonl"
    asked = [{"prompt": "What is 3 plus 4?"}, {"prompt": "Tell me about bread.", "knobs": {"concise": -1}}]
    lines.write_text("\n".join(map(json.dumps, asked)))
    said: list[list[dict[str, Any]]] = []
    for engine in (["transformers"], ["vllm", "--engine-option", "enforce_eager=true"]):
        sizes = ["--engine-option", "gpu_memory_utilization=0.1"] if engine[0] == "vllm" else []
        words = ["generate", "prefworld", "--input", str(lines), "--knob", f"concise={knob}", "--json"]
        words += ["--max-new-tokens", "24", "--engine", *engine, *sizes]
        own = rows.environment(folder, rows.IN_PROCESS)
        done = subprocess.run(
            [sys.executable, "-m", "trimtab", *words], env=own, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said.append([json.loads(line) for line in done.stdout.splitlines()])
    assert said[0] == said[1]
    assert len(said[0]) == 2


def test_the_example_of_the_docs_runs(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/engines.md").read_text(encoding="utf-8")
    example = page.split("```py\n")[1].split("```")[0]
    example = example.replace('"MODEL"', repr(str(folder / "model")))
    example = example.replace("4096", "256, 'gpu_memory_utilization': 0.1")
    example = example.replace("math.knob.safetensors", str(folder / "alpha.knob.safetensors"))
    said = run_script(folder, example + "        print('ANSWERS', [answer.knobs for answer in answers])\n")
    assert "ANSWERS [{'math': 1.0}, {'math': -0.5}]" in said


ENGINE = """
from trimtab import Rack
from trimtab.engines.vllm import Engine
from trimtab.errors import TrimtabError
import pico
if __name__ == "__main__":
    sizes = {"enforce_eager": True, "gpu_memory_utilization": 0.1, "max_model_len": 128}
    for options in ({"max_modellen": 3}, {"additional_config": {"trimtab": {}}}, ["a"]):
        try:
            Engine("prefworld", options=options)
        except TrimtabError as error:
            print("REFUSED", error)
    tuned = pico.knob(1, width=192).with_(tuning={"safe_range": [-1, 1]})
    with Engine("prefworld", Rack(m=tuned), dose="strict", layers=[1], strict=True, options=sizes) as engine:
        print("DTYPE", engine.llm.llm_engine.model_config.dtype, engine.knobs)
        for knobs in ({"m": 2}, {"m": float("nan")}, [{"m": 1}] * 2):
            try:
                engine.generate(["Hi"], knobs=knobs)
            except TrimtabError as error:
                print("REFUSED", error)
        for prompts in ("Hi", ["x" * 4000]):
            try:
                engine.generate(prompts)
            except TrimtabError as error:
                print("REFUSED", error)
        sampled = {"knobs": "m=0.5", "temperature": 0.8, "top_p": 0.9, "seed": 3, "max_new_tokens": 9}
        made = [engine.generate(["Hi"] * 2, **sampled) for _ in range(2)]
        pico.knob(1, name="n", width=192).with_(tuning={"safe_range": [-1, 1]}).save("n.knob.safetensors")
        engine.load("n", "n.knob.safetensors")
        print("LOADED", engine.knobs, engine.generate(["Hi"], knobs={"n": 0.5}, max_new_tokens=2)[0].knobs)
        print("SAMPLED", made[0] == made[1], [answer.tokens <= 9 for answer in made[0]])
    try:
        engine.generate(["Hi"])
    except TrimtabError as error:
        print("REFUSED", error)
"""


def test_the_engine_of_python_refuses_in_words(folder: Path) -> None:
    said = run_script(folder, ENGINE)
    refusals = [line for line in said.splitlines() if line.startswith("REFUSED")]
    for line, words in zip(
        refusals,
        (
            "Did you mean 'max_model_len'",
            "additional_config",
            "options are a mapping",
            "outside its safe range",
            "must be finite",
            "2 knob settings for 1 prompts",
            "Prompts come as a list",
            "this engine's context holds 128",
            "was closed",
        ),
        strict=True,
    ):
        assert words in line, line
    assert "DTYPE torch.float32 ['m']" in said
    assert "LOADED ['m', 'n'] {'n': 0.5}" in said
    assert "SAMPLED True [True, True]" in said
