"""Checking a model: what conforms, what is refused, what is wrong and must be seen, and random twins."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistakes import MISTAKES
from pico import ARCHITECTURES, LAYERS, VISION, HomeMade, knob, model, pad, prompts, vision_language_model
from trimtab.adapter import Adapter
from trimtab.check import CHECKS, Report, check, default_config, tracing, twin
from trimtab.check.trace import Broken, watching
from trimtab.cli import main
from trimtab.errors import AdapterError, OptionError, UnknownName
from trimtab.runtime import steer


def verdicts(report: Report) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in report.findings}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_conforms(name: str) -> None:
    report = check(model(name))
    assert report.verdict == "ok", report
    assert list(verdicts(report)) == ["blocks", *CHECKS]
    assert (report.architecture, report.layers) == (name, LAYERS)


@pytest.mark.parametrize("name", VISION)
def test_vision_language_models_conform_in_their_text_part(name: str) -> None:
    lm = vision_language_model(name)
    report = check(lm)
    assert report.verdict == "ok", report
    assert report.layers == LAYERS
    towers = [path for path, blocks in lm.named_modules() if isinstance(blocks, torch.nn.ModuleList)]
    assert max(len(lm.get_submodule(path)) for path in towers) > LAYERS  # type: ignore[arg-type]
    assert "vis" not in report.path


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bert", "Not a causal model"), ("deepseek_v4", "several residual streams"), ("longcat_flash", "Cannot find")],
)
def test_what_cannot_be_steered_is_refused_with_the_reason(name: str, reason: str) -> None:
    report = check(twin(default_config(name)))
    assert report.verdict == "refused"
    assert reason in report.findings[-1].said


def test_blocks_that_are_not_found_can_be_named() -> None:
    assert verdicts(check(HomeMade(towers=2))) == {"blocks": "refused"}
    report = check(model(), name="mine", layers_path="model.layers")
    assert (report.model, report.path, report.verdict) == ("mine", "model.layers", "ok")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_the_check_that_is_there_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = MISTAKES[name]
    monkeypatch.setattr(mistake.owner, mistake.name, mistake.wrong(getattr(mistake.owner, mistake.name)))
    report = check(model())
    assert verdicts(report)[mistake.seen_by] == "failed", report
    assert report.verdict == "failed"


def test_every_check_has_mistakes_to_see() -> None:
    assert {mistake.seen_by for mistake in MISTAKES.values()} == set(CHECKS)


@torch.no_grad()
def test_a_trace_tells_positions_and_sees_steered_padding() -> None:
    lm, rows = model(), prompts([5, 2])
    adapter, inputs = Adapter(lm), pad(rows)
    turned = knob(1, where="completion")
    with steer(lm, {turned: 1.0}, prompt_lengths=[4, 1]), tracing(adapter, 1, inputs["attention_mask"]) as trace:
        lm(**inputs, use_cache=False)
    assert trace.positions() == [[3, 4], [0, 1]]
    assert trace.steered[1] == {0: True, 1: True}

    def everything(hidden: Tensor) -> Tensor:
        return hidden + 1

    with (
        pytest.raises(Broken, match="Padding was steered: row 1, column 0"),
        adapter.write({1: everything}),
        tracing(adapter, 1, inputs["attention_mask"]),
    ):
        lm(**inputs)


@pytest.mark.parametrize("returns", ["tensor", "tuple"])
def test_watching_notes_what_blocks_return_and_gives_them_their_forward_back(returns: Any) -> None:
    lm = HomeMade(returns)
    blocks = list(lm.get_submodule("tower0.h").children())
    own = blocks[0].forward = partial(type(blocks[0]).forward, blocks[0])  # as accelerate gives blocks one of their own
    inputs: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with watching(lm, "tower0.h") as seen:
        lm(torch.tensor(prompts([4])))
    assert list(seen) == list(range(LAYERS))
    assert all(seen[layer] is inputs[layer + 1] for layer in range(LAYERS - 1))
    assert blocks[0].forward is own
    assert all("forward" not in vars(block) for block in blocks[1:])


def test_a_twin_keeps_what_makes_the_architecture() -> None:
    lm = twin(default_config("gemma3_text"), seed=3, num_key_value_heads=1)
    config: Any = lm.config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert (config.num_hidden_layers, config.num_key_value_heads) == (LAYERS, 1)
    assert sum(p.numel() for p in lm.parameters()) < 100_000
    assert not lm.training
    same, other = (twin(default_config("llama"), seed=seed).state_dict() for seed in (0, 1))
    again = twin(default_config("llama")).state_dict()
    assert all(torch.equal(same[key], again[key]) for key in same)
    assert not torch.equal(same["lm_head.weight"], other["lm_head.weight"])


def test_a_twin_that_cannot_be_built_says_why() -> None:
    config = default_config("llama")
    with pytest.raises(AdapterError, match=r"Cannot build a small twin of 'llama': .*hidden_size"):
        twin(config, hidden_size="wide")
    with pytest.raises(UnknownName, match=r"Unknown setting of llama 'num_layers'.*mean 'num_hidden_layers'"):
        twin(config, num_layers=2)
    assert twin(default_config("gpt2"), num_attention_heads=2).config.n_head == 2  # by its common name
    with pytest.raises(AdapterError, match="'t5' is an encoder-decoder model"):
        twin(default_config("t5"))
    with pytest.raises(AdapterError, match="no causal language model of the architecture 'vit'"):
        twin(default_config("vit"))
    with pytest.raises(OptionError, match=r"made of a configuration, such as .*; got 'qwen3'"):
        twin("qwen3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownName, match=r"'lama' is no folder.* Did you mean .*llama"):
        default_config("lama")


def test_checking_leaves_the_model_as_it_was() -> None:
    lm = model().train()
    lm(**pad(prompts([3])), output_hidden_states=True)  # transformers leaves its own hooks with their first use
    before, hooks = {k: v.clone() for k, v in lm.state_dict().items()}, len(lm.model.layers[0]._forward_hooks)
    assert check(lm).verdict == "ok"
    assert lm.training
    assert len(lm.model.layers[0]._forward_hooks) == hooks
    assert "forward" not in vars(lm.model.layers[0])
    assert all(torch.equal(value, before[key]) for key, value in lm.state_dict().items())


def test_half_precision_is_judged_by_its_own_rounding() -> None:
    assert check(model(dtype=torch.bfloat16)).verdict == "ok"


def test_the_command_prints_a_table_and_exits_with_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "prefworld"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "prefworld (llama): ok"
    assert [line.split()[0] for line in printed[2:]] == ["blocks", *CHECKS]
    model("gpt2").save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--twin", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {field.name for field in dataclasses.fields(Report)} < record.keys()
    assert (record["verdict"], record["path"]) == ("ok", "transformer.h")
    assert main(["check", "bert"]) == 1
    assert "Not a causal model" in capsys.readouterr().out
    assert main(["check", "llama", "--layers-path", "model.norm"]) == 1
    assert "has no list of layers at 'model.norm'. Lists: model.layers" in capsys.readouterr().out
    assert main(["check", "lama"]) == 2
    assert "Did you mean" in capsys.readouterr().err
