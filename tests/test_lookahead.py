"""Lookahead knobs (COLD-FD): exact, followed from token to token, row by row, and refused where they would be noise."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

import pico
from trimtab.adapter import Adapter, parameters_to
from trimtab.artifact import AnyKnob, DeltaKnob, Knob, LookaheadKnob, LowRank, load_knob, load_panel
from trimtab.artifact.lookahead import Backend, block_of
from trimtab.compose import compose
from trimtab.errors import (
    AdapterError,
    CacheError,
    KnobError,
    OptionError,
    PairsError,
    TrainError,
    TrimtabWarning,
    UnknownName,
)
from trimtab.evals.choices import pairs_task
from trimtab.evals.evaluate import evaluate
from trimtab.evals.evaluation import describe_knob
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.tasks import Task
from trimtab.forward import _load, _Rules
from trimtab.generate import generate
from trimtab.learn import learn
from trimtab.lookahead import Stream
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.render import Renderer, load
from trimtab.runtime import batches_of, steer
from trimtab.steplength import LEAST, resolution, usual_share
from trimtab.train.steps import GAIN, SHARE, learn_lookahead, learn_step
from trimtab.tune import tune
from trimtab.types import Message, Pair, Site
from trimtab.weights.rows import embedding_scale

NO_FORWARD_MODE = (
    "bloom",
    "deepseek_v3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "granitemoe",
    "jamba",
    "qwen3_next",
)
"""Architectures with a function of their own, or a grouped product for experts, that has no forward-mode derivative."""
TEXTS = pico.prompts([9, 9, 9])
pytestmark = pytest.mark.filterwarnings("ignore:Chosen answers have")  # the pairs here are of unequal lengths


def pairs(n: int = 4) -> Pairs:
    return Pairs(Pair((Message("user", f"q{i}" * (i + 1)),), f"yes{'!' * i}", "no" * (i + 2)) for i in range(n))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pico.tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pico.model()


@pytest.fixture(scope="module")
def knob(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> LookaheadKnob:
    """A knob with the whole gradient, active at layer 2, at strength 1 of an alpha that random tokens feel."""
    return learn_lookahead(model, tokenizer, pairs(), layers=[0, 1, 2], rank=None).with_(gain=2.0)


def stream(model: PreTrainedModel, setting: Any, **inputs: Any) -> dict[int, Tensor]:
    """Run the model once and return every block's output as the next block sees it."""
    adapter = Adapter(model)
    inputs = inputs or {"input_ids": torch.tensor(TEXTS)}
    with torch.no_grad(), steer(model, setting), adapter.read(range(adapter.n_layers)) as reading:
        model(**inputs)
    return {layer: acts.clone() for layer, acts in reading.acts.items()}


def moved(model: PreTrainedModel, setting: Any, layer: int, **inputs: Any) -> Tensor:
    return stream(model, setting, **inputs)[layer] - stream(model, {}, **inputs)[layer]


def shifted(model: PreTrainedModel, knob: LookaheadKnob, eta: float) -> PreTrainedModel:
    """A copy of the model whose weights are theta - eta G."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, part in knob.parts.items():
            other.get_parameter(name).sub_(part.dense() if isinstance(part, LowRank) else part, alpha=eta)
    return other


def unit_step(model: PreTrainedModel, knob: LookaheadKnob) -> float:
    """The eta at which the step is as long as the weights."""
    return math.hypot(*(float(model.get_parameter(name).detach().norm()) for name in knob.parts)) / knob.norm()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


def decode(model: PreTrainedModel, settings: Any, rows: list[list[int]], tokens: int = 6, **options: Any) -> Tensor:
    """Generate greedily from left-padded rows, with the model's own API; returns the new ids `[B, tokens]`."""
    batch = {name: value for name, value in pico.pad(rows).items() if name != "position_ids"}
    with steer(model, settings):
        run: Any = model.generate
        chosen = {"do_sample": False, **options}
        out = run(**batch, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **chosen)
    return out[:, batch["input_ids"].shape[1] :]


# --- acceptance tests of the method's card ---------------------------------------------------------------------------


def test_exact_forward_mode_and_scaled_difference_agree(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    for layer in (0, 1, 2):
        exact, scaled = (knob.with_(layers=(layer,), backend=way) for way in ("exact", "scaled"))
        assert cosine(moved(model, {exact: 0.1}, layer), moved(model, {scaled: 0.1}, layer)) > 0.999


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "phi", "mamba", "falcon_h1", "opt", "lfm2"])
def test_the_exact_derivative_is_that_of_the_weights_themselves(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model(name)
    knob = learn_lookahead(model, tokenizer, pairs(), loss="sft", layers=[0, 2], rank=None)
    h = 1e-3 * unit_step(model, knob)
    for layer in (0, 2):
        there, back = (stream(shifted(model, knob, eta), {})[layer] for eta in (h, -h))
        wanted = (there - back) / (2 * h) * knob.gain * knob.norms[layer] / knob.scales[layer]
        found = moved(model, {knob.with_(layers=(layer,)): 1.0}, layer)
        assert cosine(found, wanted) > 0.9999
        assert float(found.norm() / wanted.norm()) == pytest.approx(1, rel=5e-3)


class FromOutside(pico.HomeMade):
    """Is called as models of transformers are."""

    def forward(self, input_ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input_ids)


@pytest.mark.parametrize("backend", ["exact", "scaled"])
def test_blocks_that_return_a_tuple_move_as_those_that_return_a_tensor(backend: Backend) -> None:
    ids, found = torch.tensor([[1, 2, 3, 4, 5]]), list[Tensor]()
    for returns in ("tensor", "tuple"):
        outside = FromOutside(returns)
        adapter = Adapter(outside)
        torch.manual_seed(1)
        names = parameters_to(adapter, 1).names
        parts = {name: torch.randn_like(outside.get_parameter(name)) for name in names}
        ahead = LookaheadKnob("k", "cold-fd", parts, {1: 1.0}, {1: 1.0}, (1,), adapter.path, 0.01, backend=backend)
        with torch.no_grad(), steer(adapter, {ahead: 1.0}):
            found.append(outside(ids))
        with torch.no_grad():
            assert not torch.equal(found[-1], outside(ids))
    assert torch.equal(*found)


def test_derivatives_follow_the_rules_of_a_llama_block_by_hand(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The card's rules for linear, RMSNorm, rotary, scores, softmax, output, gate and residual, on one block."""
    model = pico.model("llama", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    knob = learn_lookahead(model, tokenizer, pairs(), layers=[0], rank=None)
    with torch.no_grad():
        wanted = _by_rules(model, knob, torch.tensor(TEXTS)) * -knob.gain * knob.norms[0] / knob.scales[0]
    assert cosine(moved(model, {knob: 1.0}, 0), wanted) > 0.99999
    torch.testing.assert_close(moved(model, {knob: 1.0}, 0), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def _by_rules(model: Any, knob: LookaheadKnob, ids: Tensor) -> Tensor:
    def g(name: str) -> Tensor:
        part = knob.parts.get(name)
        if part is None:
            return torch.zeros_like(model.get_parameter(name))
        return part.dense() if isinstance(part, LowRank) else part

    def linear(name: str, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        weight = model.get_parameter(f"{name}.weight")
        return x @ weight.T, dx @ weight.T + x @ g(f"{name}.weight").T

    def norm(name: str, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        w, eps = model.get_parameter(f"{name}.weight"), model.get_submodule(name).variance_epsilon
        rho = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        inner = dx / rho - x * (x * dx).mean(-1, keepdim=True) / rho**3
        return w * x / rho, g(f"{name}.weight") * x / rho + w * inner

    block, config = "model.layers.0", model.config
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    table = "model.embed_tokens.weight"
    x, dx = model.get_parameter(table)[ids], g(table)[ids]
    positions = torch.arange(ids.shape[1])[None]
    cos, sin = model.model.rotary_emb(x, positions)

    def rotate(v: Tensor) -> Tensor:
        half = v.shape[-1] // 2
        turned = torch.cat([-v[..., half:], v[..., :half]], -1)
        return v * cos[:, None] + turned * sin[:, None]

    def split(v: Tensor, count: int) -> Tensor:
        return v.unflatten(-1, (count, size)).transpose(1, 2).repeat_interleave(heads // count, 1)

    h, dh = norm(f"{block}.input_layernorm", x, dx)
    q, dq = (rotate(split(v, heads)) for v in linear(f"{block}.self_attn.q_proj", h, dh))
    k, dk = (rotate(split(v, keys)) for v in linear(f"{block}.self_attn.k_proj", h, dh))
    v, dv = (split(v, keys) for v in linear(f"{block}.self_attn.v_proj", h, dh))
    c, later = size**-0.5, torch.triu(torch.ones(ids.shape[1], ids.shape[1]), 1).bool()
    scores = (c * q @ k.transpose(-1, -2)).masked_fill(later, -math.inf)
    dscores = c * (dq @ k.transpose(-1, -2) + q @ dk.transpose(-1, -2))
    p = scores.softmax(-1)
    dp = p * (dscores - (p * dscores).sum(-1, keepdim=True))
    out, dout = (o.transpose(1, 2).flatten(-2) for o in (p @ v, dp @ v + p @ dv))
    added, dadded = linear(f"{block}.self_attn.o_proj", out, dout)
    x, dx = x + added, dx + dadded
    h, dh = norm(f"{block}.post_attention_layernorm", x, dx)
    gate, dgate = linear(f"{block}.mlp.gate_proj", h, dh)
    up, dup = linear(f"{block}.mlp.up_proj", h, dh)
    s = gate.sigmoid()
    silu, dsilu = gate * s, s * (1 + gate * (1 - s))
    down, ddown = linear(f"{block}.mlp.down_proj", silu * up, dsilu * dgate * up + silu * dup)
    del down
    return dx + ddown


@pytest.mark.parametrize("derived", ["all", "input", "weight", "bias"])
def test_derivatives_of_sums_and_products_are_torchs_own(derived: str) -> None:
    torch.manual_seed(0)
    inputs, weight, bias, row, scale = (torch.randn(*shape) for shape in ((2, 3, 4), (5, 4), (5,), (5,), (2, 3, 1)))
    values = {"input": inputs, "weight": weight, "bias": bias}
    moved = {name: torch.randn_like(value) for name, value in values.items() if derived in (name, "all")}

    def work() -> list[Tensor]:
        x, w, b = (forward_ad.make_dual(v, moved[n]) if n in moved else v for n, v in values.items())
        y = torch.nn.functional.linear(x, w, b)
        flat = torch.addmm(b, x[0], w.t())
        found = [y, flat, y * scale, 2 * y, y + row, row + y, y + 1e-5, scale + b, y.mul(y), y.add(y, alpha=2)]
        kept = y + row
        kept += y  # in place: the derivative of y itself stays
        tangents = (forward_ad.unpack_dual(value).tangent for value in [*found, kept, y])
        return [torch.zeros(()) if tangent is None else tangent for tangent in tangents]

    _load()
    with torch.no_grad(), forward_ad.dual_level():
        wanted = work()
        with _Rules():
            torch.testing.assert_close(work(), wanted)


def test_a_linear_layers_weights_are_read_once_and_not_written_out_as_zeros(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = learn_lookahead(model, tokenizer, pairs(), layers=[1])
    weights = {tuple(model.get_parameter(name).shape) for name in made.parts}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        stream(model, {made: 1.0})
    copied = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert not [shape for shape in copied if tuple(shape) in weights]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unresolvable_step_raises(dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model(dtype=dtype)
    knob = learn_lookahead(model, tokenizer, pairs(), layers=[1])
    share = knob.scales[1] / knob.norms[1]
    small = 1e-6 if dtype == torch.bfloat16 else 0.5 * LEAST * resolution(dtype) / share
    with pytest.raises(KnobError, match=r"cannot resolve.* A step of .* works; so does backend='exact'") as caught:
        stream(model, {knob.with_(backend="scaled", step=small): 1.0})
    said = float(str(caught.value).split("A step of ")[2].split()[0])
    works = knob.with_(backend="scaled", step=said)
    rows = [Renderer(tokenizer).full(pair.prompt, pair.chosen).ids for pair in pairs()]  # tokens that the step moves
    exact, found = (moved(model, {k: 1.0}, 1, **pico.pad(rows, "right")).float() for k in (knob, works))
    assert cosine(exact, found) > 0.9
    with pytest.raises(KnobError, match="cannot resolve"):  # learning with such a step fails too, before it is used
        stream(model, {learn_lookahead(model, tokenizer, pairs(), layers=[1], backend="scaled", step=small): 1.0})


def test_the_truncated_stream_is_the_models_own_bit_for_bit(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    adapter = Adapter(model)
    beside = Stream(adapter, knob.with_(layers=(0, 2), backend="scaled"))  # several layers: a plain run is made as well
    with torch.no_grad(), beside.ready(), adapter.write({}, before=beside.begin), adapter.read([0, 2]) as reading:
        model(input_ids=torch.tensor(TEXTS))
    for layer in (0, 2):
        assert torch.equal(beside._plain[layer], reading.acts[layer])


@pytest.mark.parametrize("backend", ["exact", "scaled"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "mamba", "falcon_h1"])
def test_cached_generation_steered_at_every_token_is_the_uncached_one(
    name: str, backend: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = pico.model(name)
    made = learn_lookahead(model, tokenizer, pairs(), layers=[1], backend=backend).with_(gain=0.5)
    rows = pico.prompts([5, 5])
    cached = decode(model, {made: 1.0}, rows)
    ids = torch.tensor(rows)
    for step in range(cached.shape[1]):
        with torch.no_grad(), steer(model, {made: 1.0}):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        assert logits.argmax(-1).tolist() == cached[:, step].tolist(), step
        ids = torch.cat([ids, cached[:, step : step + 1]], 1)


def test_several_layers_stay_finite_and_are_displaced_from_the_plain_stream(
    model: PreTrainedModel, knob: LookaheadKnob
) -> None:
    for backend in ("exact", "scaled"):
        several = knob.with_(layers=(0, 1, 2), gain=0.3, backend=backend)
        plain, steered = stream(model, {}), stream(model, {several: 1.0})
        for layer, acts in steered.items():
            assert bool(acts.isfinite().all())
            assert float(acts.norm()) < 2 * float(plain[layer].norm())
        alone = moved(model, {knob.with_(layers=(0,), gain=0.3, backend=backend): 1.0}, 0)
        torch.testing.assert_close(steered[0] - plain[0], alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max()))
    # What is added at layer 2 is the displacement of the plain prompt there, not of one that was moved below.
    adapter, ids = Adapter(model), torch.tensor(TEXTS)
    exact = knob.with_(layers=(0, 2))
    beside = Stream(adapter, exact)
    before: list[Tensor] = []
    with torch.no_grad(), steer(model, {exact: 1.0}):
        blocks = [block.register_forward_hook(_keep(before), prepend=True) for block in adapter.blocks[2:3]]
        model(input_ids=ids)
        for handle in blocks:
            handle.remove()
    with torch.no_grad(), beside.ready(), adapter.write({}, before=beside.begin):
        model(input_ids=ids)
    added = stream(model, {exact: 1.0})[2] - before[-1]
    torch.testing.assert_close(added, exact.gain * beside.displacement(2, added), rtol=1e-4, atol=1e-5)


def _keep(kept: list[Tensor]) -> Any:
    def hook(_module: object, _args: object, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    return hook


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["exact", "scaled"])
def test_mixed_batch_rows_equal_solo_runs(
    model: PreTrainedModel, knob: LookaheadKnob, side: Literal["left", "right"], backend: Any
) -> None:
    made, other = knob.with_(layers=(1,), backend=backend), pico.knob(0)
    rows = pico.prompts([4, 9, 6, 7])
    settings: list[Any] = [{made: 1.0}, {}, {made: -0.5, other: 1.0}, {other: 0.5}]
    together = stream(model, settings, **pico.pad(rows, side))
    for number, (row, setting) in enumerate(zip(rows, settings, strict=True)):
        alone = stream(model, setting, input_ids=torch.tensor([row]))
        for layer, acts in alone.items():
            got = together[layer][number]
            got = got[-len(row) :] if side == "left" else got[: len(row)]
            torch.testing.assert_close(got, acts[0], rtol=1e-3, atol=2e-3 * float(acts.abs().max()))


def test_mixed_rows_generate_as_they_do_alone(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    rows = pico.prompts([4, 9, 6])
    settings: list[Any] = [{knob: 1.0}, {}, {knob: -1.0}]
    together = decode(model, settings, rows)
    for number, (row, setting) in enumerate(zip(rows, settings, strict=True)):
        assert decode(model, setting, [row])[0].tolist() == together[number].tolist()
    torch.manual_seed(0)
    twice = decode(model, [{knob: 1.0}, {}], rows[:2], num_return_sequences=2, do_sample=True, top_k=1)
    for number, row in enumerate((0, 0, 1, 1)):  # rows are repeated side by side, each under its own setting
        assert torch.equal(twice[number], together_of(model, settings[row], rows[row]))


def together_of(model: PreTrainedModel, setting: Any, row: list[int]) -> Tensor:
    return decode(model, setting, [row])[0]


def test_low_rank_gradients_move_the_stream_as_the_whole_one_does(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, knob: LookaheadKnob
) -> None:
    whole = moved(model, {knob: 1.0}, 2)
    for rank, least in ((4, 0.95), (16, 0.999)):
        low = learn_lookahead(model, tokenizer, pairs(), layers=[0, 1, 2], rank=rank)
        assert cosine(moved(model, {low: 1.0}, 2), whole) > least
        assert low.described()["rank"] == rank
        assert 0.5 < low.diagnostics["energy"] <= 1


def test_the_error_of_first_order_falls_with_the_square_of_eta(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    plain, unit = stream(model, {})[2].double(), unit_step(model, knob)
    derivative = moved(model, {knob: 1.0}, 2).double() / (knob.gain * knob.norms[2] / knob.scales[2])  # -J G
    errors = [
        float((stream(shifted(model, knob, eta * unit), {})[2].double() - plain - eta * unit * derivative).norm())
        for eta in (0.04, 0.02, 0.01)
    ]
    for larger, smaller in itertools.pairwise(errors):
        assert 3.2 < larger / smaller < 4.8


def test_zero_strength_is_bitwise_baseline(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    plain = stream(model, {})
    for setting in ({knob: 0.0}, [{knob: 0.0}] * 3):
        for layer, acts in stream(model, setting).items():
            assert torch.equal(acts, plain[layer])
    mixed = stream(model, [{knob: 0.0}, {knob: 1.0}, {}])
    for layer, acts in mixed.items():
        assert torch.equal(acts[0], plain[layer][0])
        assert torch.equal(acts[2], plain[layer][2])
    assert all(not block._forward_hooks for block in Adapter(model).blocks)


def test_turning_the_sign_turns_the_displacement(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    torch.testing.assert_close(moved(model, {knob: -1.0}, 2), -moved(model, {knob: 1.0}, 2), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved(model, {-knob: 1.0}, 2), moved(model, {knob: -1.0}, 2))
    torch.testing.assert_close(moved(model, {0.5 * knob: 1.0}, 2), moved(model, {knob: 0.5}, 2))


@pytest.mark.parametrize("name", pico.ARCHITECTURES)
def test_every_architecture_takes_lookaheads_and_none_is_named(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model(name)
    backend = "scaled" if name in NO_FORWARD_MODE else "exact"
    if name in NO_FORWARD_MODE:
        with pytest.raises(KnobError, match=r"no forward-mode derivative.*Use backend='scaled', or load"):
            learn_lookahead(model, tokenizer, pairs(2), layers=[1])
    knob = learn_lookahead(model, tokenizer, pairs(2), layers=[1], rank=None, backend=backend)
    plain, steered = stream(model, {}), stream(model, {knob: 1.0})
    if name not in pico.EXPERTS:
        assert torch.equal(plain[0], steered[0])
    assert float((steered[1] - plain[1]).norm()) > 0
    assert bool(steered[1].isfinite().all())
    assert all(block_of(part, knob.blocks) <= 1 for part in knob.parts)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_run_one_by_one_have_an_exact_derivative(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model(name)
    model.set_experts_implementation("eager")
    knob = learn_lookahead(model, tokenizer, pairs(2), layers=[1], rank=None)
    assert bool(moved(model, {knob: 1.0}, 1).isfinite().all())


def test_turning_the_sign_lowers_the_target_metric_on_the_bundled_world() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = load("prefworld")
    learned, held = world.pairs("risk", 16), world.pairs("risk", 16, split="validation")
    knob = learn_lookahead(model, tokenizer, learned, layers=[3])
    plain, forward, back = (m.margin for m in pair_margins(model, tokenizer, held, [{}, {knob: 1.0}, {knob: -1.0}]))
    assert float((forward - plain).mean()) > 0.5
    assert float((back - plain).mean()) < -0.5


# --- sizes, places, neighbours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["exact", "scaled"])
def test_strength_is_relative_to_the_residual_norm_over_the_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, backend: Backend
) -> None:
    knob = learn_lookahead(model, tokenizer, pairs(), layers=[0, 1, 2], backend=backend)
    assert knob.gain == GAIN
    assert knob.alpha(2) == 2 * GAIN
    lengths = {layer: list[float]() for layer in knob.norms}
    for pair in pairs():
        for answer in (pair.chosen, pair.rejected):
            text = Renderer(tokenizer).full(pair.prompt, answer)
            span = slice(text.response_start, text.response_end)
            for layer, found in lengths.items():
                by = moved(model, {knob.with_(layers=(layer,)): 1.0}, layer, input_ids=torch.tensor([text.ids]))
                found += by[0, span].norm(dim=-1).tolist()
    for layer, found in lengths.items():
        assert sum(found) / len(found) == pytest.approx(knob.gain * knob.norms[layer], rel=3e-3)
    even = learn_lookahead(model, tokenizer, pairs(), layers=[2], backend=backend, per_token=True)
    alike = moved(model, {even: 1.0}, 2).norm(dim=-1)
    torch.testing.assert_close(alike, torch.full_like(alike, even.gain * even.norms[2]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["prompt", "context", "completion", "all"])
@pytest.mark.parametrize("backend", ["exact", "scaled"])
def test_where_says_which_tokens_move_with_and_without_a_cache(
    model: PreTrainedModel, knob: LookaheadKnob, where: Any, backend: Any
) -> None:
    made, rows, prompt = knob.with_(where=where, layers=(1,), backend=backend), pico.prompts([7, 7]), 4
    ids = torch.tensor(rows)
    meant = {"prompt": range(4), "context": range(3), "completion": range(3, 7), "all": range(7)}[where]
    adapter = Adapter(model)
    whole = moved(model, {made.with_(where="all"): 1.0}, 1, input_ids=ids)
    with torch.no_grad(), adapter.read([1]) as reading:
        model(input_ids=ids)
        plain = reading.acts[1].clone()
        with steer(model, {made: 1.0}, prompt_lengths=[prompt, prompt]):
            model(input_ids=ids, use_cache=False)
            at_once = reading.acts[1] - plain
        with steer(model, {made: 1.0}):
            cache, pieces = DynamicCache(), list[Tensor]()
            for span in (slice(0, prompt), slice(4, 5), slice(5, 6), slice(6, 7)):
                model(input_ids=ids[:, span], use_cache=True, **{pico.CACHE: cache})
                pieces.append(reading.acts[1].clone())
    for found in (at_once, torch.cat(pieces, 1) - plain):
        for token in range(7):
            wanted = whole[:, token] if token in meant else torch.zeros_like(whole[:, token])
            torch.testing.assert_close(found[:, token], wanted, rtol=1e-2, atol=2e-3 * float(whole.abs().max()))


def test_other_knobs_below_do_not_change_what_is_added(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    """The displacement is that of the plain prompt, whatever else steers the model."""
    other = pico.knob(0, gain=0.5)
    for backend in ("exact", "scaled"):
        made = knob.with_(layers=(1,), backend=backend)
        both, alone = stream(model, {made: 1.0, other: 1.0})[1], stream(model, {other: 1.0})[1]
        by = moved(model, {made: 1.0}, 1)
        torch.testing.assert_close(both - alone, by, rtol=1e-2, atol=2e-3 * float(by.abs().max()))
        with steer(model, {other: 1.0}):
            torch.testing.assert_close(
                stream(model, {made: 1.0})[1], both, rtol=1e-2, atol=2e-3 * float(by.abs().max())
            )


def test_a_scaled_step_refuses_another_context_within_its_own(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    ids = torch.tensor(TEXTS)
    with torch.no_grad(), steer(model, {knob.with_(backend="scaled"): 1.0}):
        model(input_ids=ids)
        with steer(model, {pico.knob(0): 1.0}), pytest.raises(AdapterError, match="Enter the other one first"):
            model(input_ids=ids)
    with torch.no_grad(), steer(model, {knob: 1.0}), steer(model, {pico.knob(0): 1.0}):
        model(input_ids=ids)


def test_two_lookaheads_add_up(model: PreTrainedModel, knob: LookaheadKnob, tokenizer: PreTrainedTokenizerFast) -> None:
    other = learn_lookahead(model, tokenizer, pairs(), layers=[2], loss="sft", name="other")
    both = moved(model, {knob: 1.0, other: 1.0}, 2)
    torch.testing.assert_close(both, moved(model, {knob: 1.0}, 2) + moved(model, {other: 1.0}, 2), rtol=1e-3, atol=1e-3)
    with pytest.raises(KnobError, match=r"have no sum\. Steer with both at once"):
        _ = knob + other


def test_a_knob_and_its_copy_follow_a_cache_each_for_itself(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    half, rest, rows = knob.with_(gain=1.0), knob.with_(gain=1.0, name="copy"), pico.prompts([5])
    assert torch.equal(decode(model, {half: 1.0, rest: 1.0}, rows), decode(model, {knob.with_(gain=2.0): 1.0}, rows))


def test_a_step_is_measured_where_the_first_guess_of_its_length_is_poor() -> None:
    bundled, words = load("prefworld")
    answers = ("Wait for a better day then.", "Now.")
    asked = Pairs(Pair((Message("user", f"Take {n} coins now, or wait?"),), *answers) for n in range(2, 8))
    exact, scaled = (learn_lookahead(bundled, words, asked, layers=[1, 3], backend=b) for b in get_args(Backend))
    for layer, scale in exact.scales.items():
        assert scaled.scales[layer] == pytest.approx(scale, rel=0.01)


def test_a_step_that_goes_too_far_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(KnobError, match=r"too far for a derivative\. A step of .* works"):
        learn_lookahead(model, tokenizer, pairs(), layers=[1], backend="scaled", step=1e9)
    with pytest.raises(KnobError, match="cannot resolve"):
        learn_lookahead(model, tokenizer, pairs(), layers=[1], backend="scaled", step=1e-9)
    with pytest.raises(OptionError, match=r"A step is of backend='scaled'; got 1\.0 for the exact one"):
        learn_lookahead(model, tokenizer, pairs(), layers=[1], step=1.0)
    with pytest.raises(KnobError, match="per_token of a lookahead is true or false; got 'no'"):
        learn_lookahead(model, tokenizer, pairs(), layers=[1], per_token="no")  # pyright: ignore[reportArgumentType]


def test_inference_mode_and_half_precision(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    with torch.inference_mode():
        inside = moved(model, {knob: 1.0}, 2)
    torch.testing.assert_close(inside.clone(), moved(model, {knob: 1.0}, 2))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert cosine(moved(half, {knob: 1.0}, 2).float(), moved(model, {knob: 1.0}, 2)) > 0.98
    assert usual_share(torch.float32) < usual_share(torch.float16) < usual_share(torch.bfloat16) < 0.5
    assert resolution(torch.float64) == resolution(torch.float32)


# --- caches ----------------------------------------------------------------------------------------------------------


def test_copies_of_a_cache_go_on_each_for_itself(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    ids = torch.tensor(TEXTS)[:1]
    with torch.no_grad(), steer(model, {knob: 1.0}):
        first = model(input_ids=ids[:, :5], use_cache=True)
        cache = first[pico.CACHE]
        copied = copy.deepcopy(cache)
        ends = [model(input_ids=ids[:, 5:7], use_cache=True, **{pico.CACHE: one}).logits for one in (cache, copied)]
        whole = model(input_ids=ids[:, :7]).logits[:, 5:]
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], whole, rtol=1e-3, atol=1e-3)


def test_a_cache_that_the_knob_has_not_followed_is_refused(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    ids = torch.tensor(TEXTS)[:1]
    with torch.no_grad():
        elsewhere = model(input_ids=ids[:, :5], use_cache=True)[pico.CACHE]
        with (
            steer(model, {knob: 1.0}, check_cache=False),
            pytest.raises(CacheError, match=r"cache of 5 tokens in 1 rows.* has seen none, and it has to follow"),
        ):
            model(input_ids=ids[:, 5:], use_cache=True, **{pico.CACHE: elsewhere})
        with steer(model, {knob: 1.0}, check_cache=False):
            cache = model(input_ids=ids[:, :5], use_cache=True)[pico.CACHE]
            cache.crop(-2)
            with pytest.raises(CacheError, match=r"cache of 3 tokens.* has seen 5 in 1"):
                model(input_ids=ids[:, 3:], use_cache=True, **{pico.CACHE: cache})


def test_beams_and_guesses_are_refused(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    with pytest.raises(OptionError, match="Lookahead knobs cannot follow beam search"):
        decode(model, {knob: 1.0}, pico.prompts([4]), num_beams=2)
    with pytest.raises(OptionError, match="Lookahead knobs cannot follow guesses"):
        decode(model, {knob: 1.0}, pico.prompts([4]), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("backend", ["exact", "scaled"])
def test_a_cache_that_the_model_makes_unasked_is_followed_too(
    model: PreTrainedModel, knob: LookaheadKnob, backend: Any
) -> None:
    ids, made = torch.tensor(TEXTS)[:1], knob.with_(backend=backend)
    with torch.no_grad(), steer(model, {made: 1.0}):
        cache = model(ids[:, :5])[pico.CACHE]
        went_on = model(ids[:, 5:7], **{pico.CACHE: cache}).logits
        whole = model(ids[:, :7], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(went_on, whole, rtol=1e-2, atol=1e-2)


def test_rows_of_a_cache_that_were_repeated_by_hand_are_refused(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    ids = torch.tensor(TEXTS)[:1]
    with torch.no_grad(), steer(model, {knob: 1.0}, check_cache=False):
        cache = model(input_ids=ids[:, :5], use_cache=True)[pico.CACHE]
        cache.batch_repeat_interleave(2)
        with pytest.raises(CacheError, match=r"cache of 5 tokens in 2 rows.* has seen 5 in 1"):
            model(input_ids=ids[:, 5:].repeat(2, 1), use_cache=True, **{pico.CACHE: cache})


def test_an_error_in_the_second_stream_is_not_continued(
    model: PreTrainedModel, knob: LookaheadKnob, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor(TEXTS)[:1]
    with torch.no_grad(), steer(model, {knob: 1.0}):
        cache = model(input_ids=ids[:, :5], use_cache=True)[pico.CACHE]
        with monkeypatch.context() as patch:
            patch.setattr("trimtab.lookahead._undual", lambda state: exec("raise MemoryError('planted')"))
            with pytest.raises(MemoryError, match="planted"):
                model(input_ids=ids[:, 5:6], use_cache=True, **{pico.CACHE: cache})
        with pytest.raises(CacheError, match="lost track at an error"):
            model(input_ids=ids[:, 5:6], use_cache=True, **{pico.CACHE: cache})


def test_what_reads_the_model_does_not_see_the_second_stream(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    adapter, ids = Adapter(model), torch.tensor(TEXTS)
    with torch.no_grad(), steer(model, {knob: 1.0}), adapter.read([0, 1, 2]) as reading:
        adapter.run_to(0, input_ids=ids)
    assert set(reading.acts) == {0}


def test_autocast_is_refused_by_a_step_and_taken_by_the_derivative(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    plain = moved(model, {knob: 1.0}, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert cosine(moved(model, {knob: 1.0}, 2).float(), plain) > 0.99
        with pytest.raises(KnobError, match=r"Under autocast the model computes in bfloat16.*Use backend='exact'"):
            stream(model, {knob.with_(backend="scaled"): 1.0})


def test_two_threads_take_turns_with_their_derivatives(tokenizer: PreTrainedTokenizerFast) -> None:
    models = [pico.model(seed=seed) for seed in (0, 1)]
    knobs = [learn_lookahead(m, tokenizer, pairs(), layers=[2]) for m in models]
    alone = [moved(m, {k: 1.0}, 2) for m, k in zip(models, knobs, strict=True)]

    def turns(number: int) -> list[Tensor]:
        return [moved(models[number], {knobs[number]: 1.0}, 2) for _ in range(6)]

    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(turns, range(2)), alone, strict=True):
            for one in found:
                torch.testing.assert_close(one, wanted, rtol=1e-3, atol=1e-3)


def test_small_gradients_of_whole_weights_do_not_vanish_in_float16(tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model(dtype=torch.float16)
    knob = learn_lookahead(pico.model(), tokenizer, pairs(), layers=[1], rank=None).with_(gain=2.0)
    tiny = replace(
        knob,
        parts={n: LowRank(p.a, p.b * 1e-8) if isinstance(p, LowRank) else p * 1e-8 for n, p in knob.parts.items()},
        scales={layer: scale * 1e-8 for layer, scale in knob.scales.items()},
    )
    whole, small = (moved(model, {k: 1.0}, 1).float() for k in (knob, tiny))
    assert cosine(whole, small) > 0.999
    assert float(small.norm() / whole.norm()) == pytest.approx(1, rel=0.02)


def test_gradients_that_are_no_numbers_are_refused(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    name = next(iter(knob.parts))
    broken = replace(knob, parts={**knob.parts, name: torch.full_like(model.get_parameter(name), float("nan"))})
    with pytest.raises(KnobError, match="holds values that are not finite"):
        stream(model, {broken: 1.0})


def test_embeddings_in_place_of_tokens_are_refused(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    embeddings: Any = model.get_input_embeddings()
    with torch.no_grad(), pytest.raises(OptionError, match=r"embeddings in place of token ids\. Pass input_ids"):
        stream(model, {knob: 1.0}, inputs_embeds=embeddings(torch.tensor(TEXTS)))


def test_weights_that_a_module_lends_are_kept_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    knob = learn_lookahead(pico.model("mamba"), tokenizer, pairs(), layers=[1], rank=2)
    lent = [part for name, part in knob.parts.items() if name.endswith("dt_proj.weight")]
    assert lent
    assert not any(isinstance(part, LowRank) for part in lent)
    assert any(isinstance(part, LowRank) for part in knob.parts.values())


def test_learning_sees_no_dropout_and_works_in_inference_mode(tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    wanted = learn_lookahead(model, tokenizer, pairs(), layers=[1])
    model.train()
    found = learn_lookahead(model, tokenizer, pairs(), layers=[1])
    assert model.training
    assert found.scales == pytest.approx(wanted.scales)
    with torch.inference_mode():
        inside = learn_lookahead(model.eval(), tokenizer, pairs(), layers=[1])
        learn_step(model, tokenizer, pairs())
        with pytest.warns(TrimtabWarning, match=r"may steer length\. Compare with length_match='bucket'\.$"):
            learn(model, tokenizer, pairs(), method="cold-kernel")
    assert inside.scales == pytest.approx(wanted.scales)


@pytest.mark.parametrize("learned", [learn_lookahead, learn_step])
def test_a_single_pair_and_unequal_lengths_are_warned_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, learned: Callable[..., LookaheadKnob | DeltaKnob]
) -> None:
    with pytest.warns(TrimtabWarning, match="There is one pair"):
        assert len(learned(model, tokenizer, pairs(1)).diagnostics["warnings"]) == 1
    uneven = r"4\.5 tokens on average and rejected ones 7\.0: .*loss='dpo:per=token'"
    with pytest.warns(TrimtabWarning, match=uneven):
        assert len(learned(model, tokenizer, pairs()).diagnostics["warnings"]) == 1
    for loss in ("dpo:per=token", "simpo", "sft"):
        assert learned(model, tokenizer, pairs(), loss=loss).diagnostics["warnings"] == []


def test_losses_that_sum_over_no_tokens_are_not_warned_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for loss in ("sft", "simpo", "dpo:per=token"):
        assert learn(model, tokenizer, pairs(), method="cold-kernel", loss=loss).diagnostics["warnings"] == []


def test_an_error_within_leaves_the_model_as_it_was(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    plain = stream(model, {})
    with pytest.raises(RuntimeError, match="planted"), steer(model, {knob: 1.0}):
        raise RuntimeError("planted")
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    for layer, acts in stream(model, {}).items():
        assert torch.equal(acts, plain[layer])


# --- the artifact ----------------------------------------------------------------------------------------------------


def test_a_lookahead_comes_back_from_its_file_bit_for_bit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, knob: LookaheadKnob, tmp_path: Path
) -> None:
    made = learn_lookahead(model, tokenizer, pairs(), name="ahead", layers=[0, 2], rank=4, licence="CC0")
    made = made.with_(
        where="completion", backend="scaled", step=0.5, per_token=True, provenance={**made.provenance, "x": 1}
    )
    made.save(tmp_path / "k")
    again = load_knob(tmp_path / "k")
    assert isinstance(again, LookaheadKnob)
    names = ("name", "method", "norms", "scales", "layers", "blocks", "gain", "where", "backend", "step", "per_token")
    for name in (*names, "provenance", "diagnostics", "tuning", "digest"):
        assert getattr(again, name) == getattr(made, name), name
    assert describe_knob(again, 2.0)["gradient_sha256"] == made.digest
    for other in (made.with_(per_token=False), made.with_(step=None), made.with_(backend="exact")):
        assert describe_knob(other, 2.0) != describe_knob(made, 2.0)
    assert made.with_(step=None).step is None
    assert (-made).provenance["scaled"] == -1
    card = again.card()
    for said in ("ahead (lookahead, cold-fd)", "by a step of 0.5 times it", "energy kept", "arXiv:2603.06495", "CC0"):
        assert said in card
    assert "exact, in forward mode" in knob.card()
    again.check(model, tokenizer)
    (tmp_path / "other").write_bytes((tmp_path / "k").read_bytes())
    with pytest.raises(KnobError, match="it is a knob of kind 'lookahead'"):
        Knob.load(tmp_path / "other")
    pico.knob().save(tmp_path / "plain")
    with pytest.raises(KnobError, match="it is a knob of kind 'steering'; this reads 'lookahead'"):
        LookaheadKnob.load(tmp_path / "plain")


def test_memory_is_that_of_the_rank(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {rank: learn_lookahead(model, tokenizer, pairs(), layers=[2], rank=rank).described() for rank in (1, 2, 4)}
    matrices = [p for n in parameters_to(Adapter(model), 2).names if (p := model.get_parameter(n)).dim() == 2]
    per_rank = sum(sum(p.shape) for p in matrices)
    assert sizes[2]["values"] - sizes[1]["values"] == per_rank
    assert sizes[4]["values"] - sizes[2]["values"] == 2 * per_rank


def test_pruning_keeps_what_the_active_layer_needs(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    low = knob.with_(site="0/lookahead")
    assert low.layers == (0,)
    assert low.site == Site(0, "lookahead")
    pruned = low.pruned()
    assert max(block_of(name, pruned.blocks) for name in pruned.parts) == 0
    assert pruned.sites == (Site(0, "lookahead"),)
    assert torch.equal(moved(model, {pruned: 1.0}, 0), moved(model, {low: 1.0}, 0))
    with pytest.raises(UnknownName, match="Unknown site '1/lookahead'"):
        pruned.with_(site="1/lookahead")
    with pytest.raises(OptionError, match="either a site or layers"):
        knob.with_(site="1/lookahead", layers=(1,))
    tuned = knob.with_(tuning={"safe_range": [0, 1]})
    assert tuned.safe_range == (0, 1)
    assert tuned.with_(name="x", diagnostics={}).tuning is not None
    assert tuned.with_(backend="scaled").tuning is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": {}}, "holds no gradient"),
        ({"gain": -1.0}, "gain must be finite and not negative"),
        ({"step": 0.0}, "step of a lookahead is above 0"),
        ({"layers": ()}, "Active layers are of"),
        ({"layers": (3,)}, "Active layers are of"),
        ({"layers": 3}, r"Active layers are several numbers, as in \(3,\) or \(3, 4\); got 3"),
        ({"gain": "x"}, "gain must be finite and not negative; got 'x'"),
        ({"scales": {0: 1.0}}, "knows norms of layers"),
        ({"norms": {0: 0.0, 1: 1.0, 2: 1.0}}, "Layer 0 needs a positive norm"),
        ({"scales": {0: 1.0, 1: math.inf, 2: 1.0}}, "Layer 1 needs a positive scale"),
        ({"backend": "wat"}, "Unknown backend 'wat'"),
    ],
)
def test_a_lookahead_that_makes_no_sense_is_an_error(knob: LookaheadKnob, changes: dict[str, Any], said: str) -> None:
    fields = {name: value for name, value in vars(knob).items() if name != "digest"}
    with pytest.raises((KnobError, UnknownName), match=said):
        LookaheadKnob(**{**fields, **changes})


def test_a_lookahead_for_another_model_is_an_error(knob: LookaheadKnob) -> None:
    with pytest.raises(KnobError, match="lacks"):
        stream(pico.model("gpt2"), {knob: 1.0})
    with pytest.raises(KnobError, match="in shape"):
        stream(pico.model(hidden_size=64), {knob: 1.0})


# --- learning, tuning, evaluating ------------------------------------------------------------------------------------


def test_learning_keeps_its_gradient_and_tells_what_it_did(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {
        "first": 0.0,
        "last": 1.0,
        "token_budget": 100,
        "seed": 1,
        "checkpoint": tmp_path / "kept",
    }
    made = learn_lookahead(
        model, tokenizer, pairs(), progress=lambda done, total: seen.append((done, total)), **options
    )
    assert seen[-1] == (4, 4)
    assert [site.layer for site in made.sites] == list(range(Adapter(model).n_layers))
    assert made.provenance["options"]["rank"] == 16
    assert made.provenance["pairs_count"] == 4
    with pytest.raises(OptionError, match=r"holds another job: work .* for cold-fd there, .* for one-step here"):
        learn_step(model, tokenizer, pairs(), checkpoint=tmp_path / "kept", token_budget=100, seed=1)
    with pytest.raises(OptionError, match=r"A checkpoint cannot tell the loss function .* from another"):
        learn_step(model, tokenizer, pairs(), checkpoint=tmp_path / "kept", loss=lambda logits, labels: logits.sum())
    monkeypatch.setattr("trimtab.train.steps.weight_gradients", None)
    assert learn_lookahead(model, tokenizer, pairs(), **options).digest == made.digest
    with pytest.raises(OptionError, match=r"holds another job: loss \(dpo there, sft here\)"):
        learn_lookahead(model, tokenizer, pairs(), loss="sft", **options)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rank": 0}, OptionError, "rank counts from 1; got 0"),
        ({"layers": []}, OptionError, "There are no layers; name"),
        ({"layers": 2}, OptionError, "Layers are a list of numbers"),
        ({"layers": ["a"]}, OptionError, "A layer is a whole number, and layers are a list"),
        ({"backend": "scaled", "step": "a"}, OptionError, "The step must be a number; got 'a'"),
        ({"where": "wat"}, UnknownName, "Unknown where 'wat'"),
        ({"loss": "wat"}, UnknownName, "Unknown loss 'wat'"),
        ({"backend": "wat"}, UnknownName, "Unknown backend 'wat'"),
        ({"step": 0.0, "backend": "scaled"}, OptionError, "number of gradients, above 0; got 0"),
    ],
)
def test_wrong_options_are_errors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], error: type, said: str
) -> None:
    with pytest.raises(error, match=said):
        learn_lookahead(model, tokenizer, pairs(), **options)


def test_pairs_without_a_gradient_are_an_error(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def nothing(logits: Tensor, labels: Tensor) -> Tensor:
        return 0 * logits.sum()

    for function in (learn_lookahead, learn_step):
        with pytest.raises(TrainError, match="no gradient"):
            function(model, tokenizer, pairs(), loss=nothing)
        with pytest.raises(PairsError, match="at least one"):
            function(model, tokenizer, Pairs())


def test_embeddings_that_scale_their_rows_are_found_out() -> None:
    plain, gemma = pico.model("llama").get_input_embeddings(), pico.model("gemma3_text").get_input_embeddings()
    positions = pico.model("opt").get_submodule("model.decoder.embed_positions")
    assert embedding_scale(plain) == 1.0
    assert embedding_scale(gemma) == pytest.approx(32**0.5, rel=1e-3)
    assert embedding_scale(positions) is None
    assert embedding_scale(torch.nn.Linear(2, 2)) is None


def task() -> Task:
    return Task("yes", ("q", "qq"), lambda answers: [float("y" in a) for a in answers], max_new_tokens=3)


def test_lookaheads_are_tuned_evaluated_and_generated_with(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    knob = learn_lookahead(model, tokenizer, pairs(), layers=[0, 1], name="ahead")
    held = Pairs(Pair((Message("user", f"other {i}"),), "yes", "no") for i in range(3))
    options: dict[str, Any] = {
        "gains": (0.05, 0.1),
        "where": ["all", "completion"],
        "finalists": 1,
        "strengths": (1.0,),
    }
    tuned = tune(knob, model, tokenizer, held, checkpoint=tmp_path / "kept", broken_budget=1.0, **options)
    assert tuned.tuning is not None
    assert len(tuned.tuning["ranking"]) == 2 * 2 * 2
    assert tuned.sites == (tuned.site,)
    assert tuned.gain in (0.05, 0.1)
    base, steered = pair_margins(model, tokenizer, held, [{}, {tuned: 1.0}])
    assert float((steered.margin - base.margin).mean()) > 0
    found = evaluate(model, tokenizer, [task()], {tuned: 1.0})
    assert found
    texts = generate(model, tokenizer, ["q", "qq"], knobs=[{tuned: 1.0}, {}], max_new_tokens=3, where="prompt")
    assert [g.knobs for g in texts] == [{"ahead": 1.0}, {}]


def test_lookaheads_are_composed_with_knobs_of_other_kinds_into_a_panel(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ahead = learn_lookahead(model, tokenizer, pairs(), layers=[1], name="ahead")
    step = learn_step(model, tokenizer, pairs(), name="step")
    held = Pairs(Pair((Message("user", f"other {i}"),), "yes", "no") for i in range(3))
    knobs: dict[str, AnyKnob] = {"ahead": ahead, "step": step, "way": pico.knob(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)  # of a goal that three items may not tell from the base model
        found = compose(
            knobs, model, tokenizer, [pairs_task(held)], search="grid", grid=(0.0, 1.0), guardrails=[task()], budget=1.0
        )
    assert len(found.record["trials"]) == 8
    found.save(tmp_path / "panel.json")
    panel = load_panel(tmp_path / "panel.json")
    assert {knob.kind for knob in panel.rack.values()} <= {"lookahead", "delta", "steering"}
    settings = panel.rack.resolve(panel.setting)
    base, turned = pair_margins(model, tokenizer, held, [{}, settings])
    assert float((turned.margin - base.margin).mean()) >= 0


def test_rows_share_a_batch_with_those_of_the_same_lookaheads(knob: LookaheadKnob) -> None:
    other = knob.with_(name="other")
    doses: list[Any] = [{knob: 1.0}, {}, {knob: -2.0}, {other: 1.0}, {knob: 0.0}]
    assert batches_of(doses) == [[0, 2], [1, 4], [3]]


def test_a_steps_gradient_is_kept_too(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def step() -> DeltaKnob:
        kept = tmp_path / "kept"
        return learn_step(
            model, tokenizer, pairs(), loss="sft", checkpoint=kept, progress=lambda done, total: seen.append(done)
        )

    first = step()
    assert seen[-1] == 4
    assert first.provenance["options"]["loss"] == "sft"
    monkeypatch.setattr("trimtab.train.steps.weight_gradients", None)
    assert step().digest == first.digest


# --- the step itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 16])
def test_one_step_is_minus_the_gradient_as_long_as_the_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rank: int | None, knob: LookaheadKnob
) -> None:
    step = learn_step(model, tokenizer, pairs(), rank=rank, name="step", seed=0, token_budget=100, licence="CC0")
    assert step.low_rank == (rank is not None)
    assert step.gain == 1
    assert step.method == "one-step"
    length = math.hypot(*(float(model.get_parameter(name).detach().norm()) for name in step.parts))
    assert step.norm() == pytest.approx(SHARE * length, rel=1e-4)
    for name in knob.parts.keys() & step.parts.keys():
        ours, theirs = step.dense(name), knob.parts[name]
        theirs = theirs.dense() if isinstance(theirs, LowRank) else theirs
        assert cosine(ours, -theirs) > 0.99, name
    base, steered = pair_margins(model, tokenizer, pairs(), [{}, {step: 0.5}])
    assert float((steered.margin - base.margin).mean()) > 0
    eta = 0.5 * step.diagnostics["step_norm"] / step.diagnostics["gradient_norm"]
    if rank is None:  # the paper's eta makes the same model
        with torch.no_grad(), steer(model, {step: 0.5}):
            ours = model(input_ids=torch.tensor(TEXTS)).logits
        whole = learn_lookahead(model, tokenizer, pairs(), rank=None, last=1.0)
        other = shifted(model, whole, eta)
        with torch.no_grad():
            for name in step.parts.keys() - whole.parts.keys():
                other.get_parameter(name).add_(step.dense(name), alpha=0.5)
            torch.testing.assert_close(other(input_ids=torch.tensor(TEXTS)).logits, ours, rtol=1e-3, atol=1e-3)


def test_a_setting_without_lookahead_lets_the_second_stream_go(model: PreTrainedModel, knob: LookaheadKnob) -> None:
    with torch.no_grad(), steer(model, {knob: 0.1}) as steering:
        model(input_ids=torch.tensor(TEXTS), use_cache=True)
        assert steering._moving
        steering.set({pico.knob(): 1.0})
        assert not steering._moving
