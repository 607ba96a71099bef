"""What the engines are compared on: a random model, knobs of every place, requests, and transformers' answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

import pico
from trimtab.artifact import AnyKnob, DeltaKnob, LowRank, Rack
from trimtab.runtime import steer

WIDTH, LAYERS = 128, 4
NEW = 12
"""Tokens of an answer."""
TOLERANCE = 1e-4
"""Of log-probabilities, in float32."""
RANK = 4


class Request(NamedTuple):
    """A prompt with its setting."""

    ids: list[int]
    knobs: dict[str, float]


class Answer(NamedTuple):
    """Greedy tokens, with the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def model() -> PreTrainedModel:
    """A random model whose greedy choices are far apart, of sizes that every engine's kernels take."""
    return pico.model(
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.15,
        max_position_embeddings=512,
    )


def weight_knob(name: str, seed: int) -> DeltaKnob:
    """A random difference of low rank, on projections that vLLM packs and on one that it does not."""
    generator = torch.Generator().manual_seed(seed)

    def part(out: int, inner: int) -> LowRank:
        a, b = torch.randn(RANK, inner, generator=generator), torch.randn(out, RANK, generator=generator)
        return LowRank(0.1 * a, 0.1 * b)

    parts = {
        f"model.layers.{layer}.{place}.weight": part(out, inner)
        for layer in range(seed % 2, LAYERS)
        for place, out, inner in (
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("self_attn.v_proj", WIDTH // 2, WIDTH),
            ("mlp.down_proj", WIDTH, 256),
        )
    }
    return DeltaKnob(name, "delta", parts)


def rack(*, weights: bool = True) -> Rack:
    """Knobs of every place and layer, and two on weights."""
    norm = 12.0
    added: dict[str, AnyKnob] = {
        "alpha": pico.knob(1, name="alpha", seed=1, width=WIDTH, norm=norm),
        "beta": pico.knob(2, name="beta", seed=2, width=WIDTH, norm=norm),
        "first": pico.knob(0, name="first", seed=3, width=WIDTH, norm=norm),
        "said": pico.knob(1, name="said", seed=4, width=WIDTH, norm=norm, where="completion"),
        "asked": pico.knob(2, name="asked", seed=5, width=WIDTH, norm=norm, where="prompt"),
        "before": pico.knob(1, name="before", seed=6, width=WIDTH, norm=norm, where="context"),
        "end": pico.knob(3, name="end", seed=7, width=WIDTH, norm=norm, where="completion"),
    }
    if weights:
        added |= {"polite": weight_knob("polite", 1), "terse": weight_knob("terse", 2)}
    return Rack(**added)


SETTINGS: list[dict[str, float]] = [
    {},
    {"alpha": 1.0},
    {"beta": -1.5},
    {"alpha": 0.7, "beta": 0.4},
    {"first": 0.5, "alpha": -0.8, "beta": 0.6, "end": 0.9},
    {"said": 1.2},
    {"asked": 1.0, "said": -0.6},
    {"before": 1.5},
]
WEIGHT_SETTINGS: list[dict[str, float]] = [
    {"polite": 1.0},
    {"polite": 0.7, "terse": -0.4},
    {"terse": 1.3, "alpha": 0.6, "said": 0.5},
]


def requests(*, weights: bool = True) -> list[Request]:
    """Requests of several lengths, each with a setting of its own."""
    settings = [*SETTINGS, *(WEIGHT_SETTINGS if weights else [])]
    lengths = [7 + 5 * (i % 4) for i in range(len(settings))]
    return [Request(ids, knobs) for ids, knobs in zip(pico.prompts(lengths), settings, strict=True)]


def stress_requests(count: int = 40, *, weights: bool = True) -> list[Request]:
    """Requests with long prompts that begin alike in three ways, some of them under the same setting."""
    settings = [*SETTINGS[:3], *(WEIGHT_SETTINGS[1:] if weights else []), *SETTINGS[4:]]
    stems = pico.prompts([64, 64, 40], seed=1)
    tails = pico.prompts([3 + 7 * (i % 5) for i in range(count)], seed=2)
    return [Request(stems[i % 3] + tails[i], settings[(i // 6 + i % 3) % len(settings)]) for i in range(count)]


@torch.no_grad()
def reference(own: PreTrainedModel, knobs: Rack, asked: Sequence[Request], new: int = NEW) -> list[Answer]:
    """Answer each request alone, by transformers with hooks: no batch, no padding, no shared cache."""
    answers: list[Answer] = []
    for request in asked:
        ids, tokens, logprobs = torch.tensor([request.ids]), list[int](), list[float]()
        with steer(own, knobs.resolve(request.knobs)):
            out: Any = own(ids, use_cache=True)
            for _ in range(new):
                scores = out.logits[0, -1].float().log_softmax(-1)
                tokens.append(int(scores.argmax()))
                logprobs.append(float(scores[tokens[-1]]))
                out = own(torch.tensor([[tokens[-1]]]), use_cache=True, **{pico.CACHE: getattr(out, pico.CACHE)})
        answers.append(Answer(tokens, logprobs))
    return answers


def compare(found: Sequence[Answer], wanted: Sequence[Answer]) -> tuple[int, float]:
    """Return how many answers have the same tokens, and the largest difference of log-probabilities in these."""
    equal = [(a, b) for a, b in zip(found, wanted, strict=True) if a.tokens == b.tokens]
    gaps = [abs(x - y) for a, b in equal for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    return len(equal), max(gaps, default=float("inf"))


def save(folder: Path, own: PreTrainedModel, knobs: Rack) -> dict[str, str]:
    """Write the model, its tokenizer and the knobs to a folder, and return the knobs' paths by name."""
    own.save_pretrained(folder / "model")
    pico.tokenizer().save_pretrained(folder / "model")
    paths: dict[str, str] = {}
    for name, knob in knobs.items():
        paths[name] = str(folder / f"{name}.knob.safetensors")
        knob.save(paths[name])
    return paths


def write_answers(path: Path, answers: Sequence[Answer], facts: Mapping[str, object]) -> None:
    """Keep what an engine said, and what it was."""
    path.write_text(json.dumps({"answers": [list(answer) for answer in answers], **facts}))


def read_answers(path: Path) -> tuple[list[Answer], dict[str, Any]]:
    """Read what `write_answers` kept."""
    content = json.loads(path.read_text())
    return [Answer(*answer) for answer in content.pop("answers")], content
