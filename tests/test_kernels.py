"""Knobs that depend on the stream: piece-wise ones and kernels over examples, by hand, on models, in files."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import pico
import trimtab
from trimtab.adapter import CACHE_NAMES, Adapter
from trimtab.addends import Pull, Push, react
from trimtab.artifact import KernelExamples, Knob, Operation
from trimtab.cli import main
from trimtab.errors import CacheError, KnobError, OptionError, TrimtabWarning, UnknownName
from trimtab.evals.evaluation import describe_knob
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.tasks import Task
from trimtab.kernels import KERNELS, WARMEST, Kernel, kernel_weights, make_weigher
from trimtab.learn import learn
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.render import Renderer
from trimtab.runtime import steer
from trimtab.tune import tune
from trimtab.types import Message, Pair, Site, Where

DEPENDENT: tuple[Kernel, ...] = ("cosine", "softmax", "linear")
KINDS: tuple[tuple[Operation, Kernel], ...] = (("piecewise", "softmax"), *(("kernel", kernel) for kernel in DEPENDENT))
N, D = 7, 12


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(state: Tensor, keys: Tensor, kernel: Kernel, temperature: float) -> list[float]:
    """Weigh the examples by one state, example by example in float64."""
    h, z = state.double(), keys.double()
    if kernel == "unit":
        return [1.0] * len(z)
    if kernel == "cosine":
        return [float(h @ key / h.norm() / key.norm()) for key in z]
    if kernel == "linear":
        return [float(h @ key) / float(torch.stack([k @ k for k in z]).mean()) for key in z]
    m = torch.stack([*z]).mean(0)

    def cos(a: Tensor, b: Tensor) -> float:
        return float((a - m) @ (b - m) / (a - m).norm() / (b - m).norm())

    square = sum(cos(a, b) ** 2 for a in z for b in z) / len(z) ** 2
    scores = [math.exp(cos(h, key) / math.sqrt(square) / temperature) for key in z]
    return [len(z) * score / sum(scores) for score in scores]


def added(knob: Knob, state: Tensor, strength: float) -> Tensor:
    """What a knob adds to one state, in float64, without the code that adds it."""
    length = strength * knob.gain * knob.norms[knob.site.layer]
    if knob.kernel is None:
        u = knob.vectors[knob.site].double()
        along = float(state.double() @ u)
        return length * ((along > 0) - (along < 0)) * u / u.norm()
    keys, values = knob.kernel.keys[knob.site], knob.kernel.values[knob.site].double()

    def total(at: Tensor) -> Tensor:
        weights = by_hand(at, keys, knob.kernel.kind, knob.kernel.temperature)  # pyright: ignore[reportOptionalMemberAccess]
        return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros(len(at), dtype=torch.float64))

    scale = sum(float(total(key).norm()) for key in keys) / len(keys)
    return length * total(state) / scale


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_equal_a_computation_example_by_example(kernel: Kernel, temperature: float) -> None:
    states, keys = noise(0, 2, 3, D) + 0.5, 3 * noise(1, N, D) + 2
    for wide, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        found = kernel_weights(states.to(wide), keys, kernel, temperature=temperature)
        assert found.dtype == wide
        assert found.shape == (2, 3, N)
        expected = [[by_hand(h, keys, kernel, temperature) for h in row] for row in states]
        torch.testing.assert_close(
            found.double(), torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=tolerance
        )
    fast = make_weigher(keys, kernel, temperature).to(states).weights(states)  # as the runtime has it
    torch.testing.assert_close(fast, kernel_weights(states, keys, kernel, temperature), atol=1e-5, rtol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_know_no_unit_of_length(kernel: Kernel) -> None:
    states, keys = noise(0, 4, D), noise(1, N, D) + 1
    plain = kernel_weights(states.double(), keys.double(), kernel)
    torch.testing.assert_close(kernel_weights(1e4 * states.double(), 1e4 * keys.double(), kernel), plain)


@pytest.mark.quick
@pytest.mark.parametrize("width", [8, 64, 1024])
@pytest.mark.parametrize("shared", [0.0, 100.0])
def test_a_softmax_of_temperature_1_tells_examples_apart_at_every_width_and_whatever_states_share(
    width: int, shared: float
) -> None:
    keys, states = (noise(seed, 200, width).double() + shared for seed in (0, 1))
    weights = kernel_weights(states, keys, "softmax")
    torch.testing.assert_close(weights.sum(-1), torch.full((200,), 200.0).double())
    effective = weights.sum(-1).square() / weights.square().sum(-1)
    assert 30 < float(effective.mean()) < 175  # neither one example nor all of them alike
    cold, warm = (kernel_weights(states, keys, "softmax", temperature=t) for t in (0.01, 1e6))
    assert float(cold.max(-1).values.median()) > 199
    torch.testing.assert_close(warm, torch.ones_like(warm), atol=1e-4, rtol=0)


@pytest.mark.quick
@pytest.mark.parametrize("kernel", KERNELS)
def test_states_that_are_zero_alike_or_alone_have_finite_weights(kernel: Kernel) -> None:
    for keys in (torch.zeros(N, D), torch.ones(N, D), noise(0, 1, D), torch.full((2, D), 1e30)):
        for states in (torch.zeros(3, D), torch.ones(3, D), noise(1, 3, D), torch.full((3, D), -1e30)):
            weights = kernel_weights(states, keys, kernel)
            assert weights.isfinite().all()
            if kernel == "softmax":
                torch.testing.assert_close(weights.sum(-1), torch.full((3,), float(len(keys))))


# --- steering ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def change(lm: PreTrainedModel, knob: Knob, strength: float, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a layer's plain output, and what steering changes there."""
    adapter, layer = Adapter(lm), knob.site.layer
    with adapter.read([layer]) as base:
        lm(**inputs)
    with adapter.read([layer]) as seen, steer(lm, {knob: strength}):
        lm(**inputs)
    return base.acts[layer], seen.acts[layer] - base.acts[layer]


@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize(("operation", "kernel"), KINDS)
def test_what_is_added_equals_a_computation_by_hand(operation: Operation, kernel: Kernel, strength: float) -> None:
    lm, knob = pico.model(), pico.knob(1, operation=operation, kernel=kernel, gain=0.4, temperature=0.8)
    base, moved = change(lm, knob, strength, pico.pad(pico.prompts([6])))
    for state, found in zip(base[0], moved[0], strict=True):
        torch.testing.assert_close(found.double(), added(knob, state, strength), atol=2e-5, rtol=1e-4)
    assert float(moved.norm(dim=-1).min()) > 1e-2


@pytest.mark.parametrize("kernel", DEPENDENT)
def test_strength_1_is_an_alpha_of_the_gain_on_average_over_the_examples(kernel: Kernel) -> None:
    knob = pico.knob(1, operation="kernel", kernel=kernel, gain=0.3, norm=5.0)
    assert knob.kernel is not None
    keys = knob.kernel.keys[knob.site]
    lengths = torch.stack([added(knob, key, 1.0).norm() for key in keys])
    assert float(lengths.mean()) == pytest.approx(0.3 * 5.0)
    assert knob.length(2.0) == pytest.approx(2 * 0.3 * 5.0)
    pull = Pull("all", torch.tensor(1.5), knob.kernel.weigher(knob.site).to(keys), knob.kernel.scaled(knob.site))
    torch.testing.assert_close(pull.delta(keys[None])[0].norm(dim=-1), lengths.float(), atol=1e-5, rtol=1e-4)


def test_a_state_on_neither_side_is_left_where_it_is() -> None:
    push = Push("all", torch.tensor(2.0), torch.tensor([1.0, 0.0]))
    hidden = torch.tensor([[[0.0, 3.0], [1e-30, 3.0], [-5.0, 0.0]]])
    assert push.delta(hidden).tolist() == [[[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0]]]


@torch.no_grad()
def test_uniform_weights_are_the_unit_kernel() -> None:
    lm, inputs = pico.model(), pico.pad(pico.prompts([6, 3]))
    knob = pico.knob(1, operation="kernel", temperature=WARMEST)
    with steer(lm, {knob: 0.8}):
        ours = lm(**inputs).logits
    with steer(lm, {knob.with_(operation="add"): 0.8}):
        torch.testing.assert_close(lm(**inputs).logits, ours, atol=1e-4, rtol=1e-4)


def test_one_example_under_a_softmax_is_a_constant_vector() -> None:
    knob = pico.knob(1, operation="kernel", examples=1)
    _, moved = change(pico.model(), knob, -2.0, pico.pad(pico.prompts([6])))
    torch.testing.assert_close(moved, knob.addend(-2.0).expand_as(moved), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("operation", "kernel"), KINDS)
@torch.no_grad()
def test_rows_at_strength_0_and_padding_keep_every_bit(
    operation: Operation, kernel: Kernel, dtype: torch.dtype
) -> None:
    lm, adapter = pico.model(dtype=dtype), Adapter(pico.model())
    adapter, knob = Adapter(lm), pico.knob(1, operation=operation, kernel=kernel)
    for side in ("left", "right"):
        inputs = pico.pad(pico.prompts([6, 6, 2]), side)
        with adapter.read([1]) as base:
            lm(**inputs)
        with adapter.read([1]) as seen, steer(lm, [{knob: 1.0}, {knob: 0.0}, {knob: -1.0}], prompt_lengths=[6, 6, 2]):
            lm(**inputs)
        real = inputs["attention_mask"].bool()
        real[1] = False
        same = (seen.acts[1].view(torch.uint8) == base.acts[1].view(torch.uint8)).all(-1)
        assert torch.equal(same, ~real)
        for row in (0, 2):
            alone = inputs | {name: value[row : row + 1] for name, value in inputs.items()}
            with adapter.read([1]) as solo, steer(lm, {knob: 1.0 if row == 0 else -1.0}, prompt_lengths=[6 - 2 * row]):
                lm(**alone)
            at = 0.05 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(seen.acts[1][row], solo.acts[1][0], atol=at, rtol=at)


@torch.no_grad()
def test_a_negative_zero_next_to_a_steered_token_keeps_its_sign() -> None:
    push = Push("all", torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([1.0, 0.0]))
    hidden = torch.tensor([[[2.0, -0.0], [2.0, 1.0]], [[2.0, -0.0], [math.inf, 1.0]]])
    after = react(hidden, push, hidden, torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]]]))
    assert after[0, 0].tolist() == [3.0, 0.0]
    assert torch.equal(after[0, 1].view(torch.int32), hidden[0, 1].view(torch.int32))
    assert torch.equal(after[1].view(torch.int32), hidden[1].view(torch.int32))


@pytest.mark.parametrize(("operation", "kernel"), KINDS)
@torch.no_grad()
def test_strength_0_everywhere_is_bitwise_the_plain_model(operation: Operation, kernel: Kernel) -> None:
    lm, inputs = pico.model(), pico.pad(pico.prompts([6, 3]))
    base, knob = lm(**inputs).logits, pico.knob(1, operation=operation, kernel=kernel)
    for settings in ({knob: 0.0}, [{knob: 0.0}, {}], {0 * knob: 1.0}):
        with steer(lm, settings, check_cache=False):
            assert not any(len(module._forward_hooks) for module in lm.modules())
            assert torch.equal(lm(**inputs).logits, base)


@pytest.mark.parametrize("where", ["all", "prompt", "context", "completion"])
@pytest.mark.parametrize(("operation", "kernel"), KINDS)
@torch.no_grad()
def test_cached_equals_uncached(operation: Operation, kernel: Kernel, where: Where) -> None:
    lm, knob = pico.model(), pico.knob(1, operation=operation, kernel=kernel, where=where)
    rows, new = pico.prompts([5, 5]), torch.tensor(pico.prompts([4, 4], seed=1))
    settings: list[dict[Knob, float]] = [{knob: 1.0}, {knob: -0.5}]
    ids = torch.cat([torch.tensor(rows), new], 1)
    with steer(lm, settings, prompt_lengths=[5, 5]):
        whole = lm(ids, use_cache=False).logits
    with steer(lm, settings):
        out = lm(torch.tensor(rows), use_cache=True)
        logits = [out.logits]
        for token in new.T:
            cache = {name: value for name, value in out.items() if name in CACHE_NAMES and value is not None}
            out = lm(token[:, None], use_cache=True, **cache)
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, lm(ids, use_cache=False).logits, atol=1e-3)
    given: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": pico.PAD}
    given["attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    with steer(lm, settings, prompt_lengths=[5, 5]):
        first, second = (lm.generate(torch.tensor(rows), use_cache=cached, **given) for cached in (True, False))
    assert torch.equal(cast(Tensor, first), cast(Tensor, second))


@torch.no_grad()
def test_a_cache_knows_one_kernel_from_another() -> None:
    lm, ids = pico.model(), torch.tensor(pico.prompts([5]))
    knob = pico.knob(1, operation="kernel")
    assert knob.kernel is not None
    twin = pico.knob(1, operation="kernel", name="twin")
    others = [
        pico.knob(1, operation="kernel", kernel="cosine"),
        pico.knob(1, operation="kernel", temperature=0.5),
        pico.knob(1, operation="kernel", seed=1),
        knob.with_(operation="add"),
        knob.with_(operation="piecewise"),
        -knob,
        2 * knob,
    ]
    with steer(lm, {knob: 1.0}):
        out = lm(ids, use_cache=True)
    cache = {name: value for name, value in out.items() if name in CACHE_NAMES}
    for other in others:
        with steer(lm, {other: 1.0}), pytest.raises(CacheError, match="were computed under other knobs"):
            lm(torch.tensor([[9]]), **cache)
    with steer(lm, {twin: 1.0}):
        lm(torch.tensor([[9]]), **cache)


@torch.no_grad()
def test_all_of_them_look_at_the_blocks_own_output_and_ablations_come_first() -> None:
    lm, inputs = pico.model(), pico.pad(pico.prompts([6]))
    parts = [pico.knob(1, name=o, operation=o, seed=i) for i, o in enumerate(("kernel", "piecewise", "add"))]
    alone = [change(lm, part, 1.0, inputs)[1] for part in parts]
    adapter, together = Adapter(lm), dict.fromkeys(parts, 1.0)
    with adapter.read([1]) as base:
        lm(**inputs)
    with adapter.read([1]) as seen, steer(lm, together):
        lm(**inputs)
    torch.testing.assert_close(seen.acts[1] - base.acts[1], sum(alone), atol=1e-5, rtol=1e-5)
    for name in ("a", "z"):
        removed = pico.knob(1, name=name, operation="ablate", seed=9)
        with adapter.read([1]) as seen, steer(lm, {**together, removed: 1.0}):
            lm(**inputs)
        without = base.acts[1] - (base.acts[1] @ removed.direction)[..., None] * removed.direction
        torch.testing.assert_close(seen.acts[1] - without, sum(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_autocast_does_not_blur_the_weights() -> None:
    knob = pico.knob(1, operation="kernel")
    assert knob.kernel is not None
    hidden = noise(0, 1, 4, pico.WIDTH)
    pull = Pull("all", torch.tensor(1.0), knob.kernel.weigher(knob.site).to(hidden), knob.kernel.scaled(knob.site))
    plain = react(hidden, pull, hidden, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(react(hidden, pull, hidden, None), plain)


@pytest.mark.parametrize("kernel", DEPENDENT)
def test_gradients_flow_through_the_weights(kernel: Kernel) -> None:
    knob = pico.knob(1, operation="kernel", kernel=kernel)
    assert knob.kernel is not None
    weigher, values = knob.kernel.weigher(knob.site), knob.kernel.scaled(knob.site).double()
    hidden = noise(0, 1, 3, pico.WIDTH).double().requires_grad_()

    def pulled(h: Tensor) -> Tensor:
        return weigher.weights(h) @ values

    assert torch.autograd.gradcheck(pulled, (hidden,))
    masked = torch.zeros(1, 2, pico.WIDTH, requires_grad=True)
    pull = Pull("all", torch.tensor(1.0), weigher.to(masked), values.float())
    react(masked, pull, masked, torch.tensor([[[1.0], [0.0]]])).sum().backward()
    assert masked.grad is not None
    assert masked.grad.isfinite().all()
    assert torch.equal(masked.grad[0, 1], torch.ones(pico.WIDTH))


@pytest.mark.parametrize(("operation", "kernel"), KINDS)
def test_a_strength_beyond_the_dtype_is_an_error(operation: Operation, kernel: Kernel) -> None:
    knob = pico.knob(1, operation=operation, kernel=kernel)
    refused = pytest.raises(OptionError, match=r"too large for torch.float16; got \[{'pico': 100000.0}\]")
    with refused, steer(pico.model(dtype=torch.float16), {knob: 1e5}):
        pass


# --- the knob and its file --------------------------------------------------------------------------------------------

A, B = Site(1, "last_prompt"), Site(2, "last_prompt")


def kernel_knob(**changes: Any) -> Knob:
    keys, values = ({A: noise(i, N, D), B: noise(i + 1, N, D)} for i in (0, 2))
    return Knob(
        **{
            "name": "k",
            "method": "cold-kernel",
            "vectors": {site: v.sum(0) for site, v in values.items()},
            "norms": {1: 4.0, 2: 7.7},
            "site": A,
            "gain": 0.2,
            "operation": "kernel",
            "kernel": KernelExamples.weigh("softmax", 0.5, keys, values),
            "tuning": {"safe_range": [0, 1]},
        }
        | changes
    )


def examples(**changes: Any) -> KernelExamples:
    keys, values = {A: noise(0, N, D)}, {A: noise(2, N, D)}
    fields = {"kind": "cosine", "temperature": 1.0, "keys": keys, "values": values, "scales": {A: 1.0}}
    return KernelExamples(**{**fields, **changes})


@pytest.mark.quick
def test_file_round_trip_is_bitwise_and_self_describing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, knob = tmp_path / "k.knob.safetensors", kernel_knob()
    knob.save(path)
    back = Knob.load(path)
    assert knob.kernel is not None
    assert back.kernel is not None
    assert back.kernel.header() == knob.kernel.header()
    for site in (A, B):
        for part in ("keys", "values"):
            ours, theirs = (getattr(k.kernel, part)[site].numpy().tobytes() for k in (knob, back))
            assert ours == theirs
        assert back.kernel.digest(site) == knob.kernel.digest(site)
    assert back.card() == knob.card()
    assert "kernel softmax at temperature 0.5 over 7 examples" in knob.card()
    assert "length 0.8 on average over the examples where the mean residual norm is 4;" in knob.card()
    again = tmp_path / "again.knob.safetensors"
    back.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert main(["inspect", str(path)]) == 0
    assert "kernel softmax at temperature 0.5 over 7 examples" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["kernel"]
    assert told == {**knob.kernel.header(), "examples": 7}
    assert describe_knob(back, 1.0)["kernel"]["sha256"] == knob.kernel.digest(A).hex()


@pytest.mark.quick
@pytest.mark.parametrize("operation", ["add", "ablate", "piecewise"])
def test_files_of_other_knobs_say_nothing_of_kernels(operation: Operation, tmp_path: Path) -> None:
    pico.knob(1, operation=operation).save(tmp_path / "k")
    data = (tmp_path / "k").read_bytes()
    assert b"kernel" not in data[: 8 + struct.unpack("<Q", data[:8])[0]]
    back = Knob.load(tmp_path / "k")
    assert (back.operation, back.kernel) == (operation, None)
    assert "kernel" not in describe_knob(back, 1.0)


@pytest.mark.quick
def test_arithmetic_copies_and_prunes_of_a_kernel_knob() -> None:
    knob, state = kernel_knob(), noise(9, D)
    one = added(knob, state, 1.0)
    for other, factor in ((-knob, -1.0), (2 * knob, 2.0), (knob * -0.5, -0.5)):
        torch.testing.assert_close(added(other, state, 1.0), factor * one)
        torch.testing.assert_close(
            added(other.with_(site=B, gain=1.0), state, 1.0).norm(),
            torch.tensor(1.0) * float(added(knob.with_(site=B, gain=1.0), state, 1.0).norm()),
            check_dtype=False,
        )
    small = knob.pruned(B)
    assert knob.kernel is not None
    assert small.kernel is not None
    assert list(small.kernel.keys) == list(small.vectors) == [B]
    assert small.pruned().kernel is small.kernel  # and so is what was prepared
    assert small.gain == pytest.approx(knob.kernel.scales[B] / 7.7) == knob.raw_gain(B)
    assert knob.raw_length(site=B) == knob.kernel.scales[B]
    assert list(knob.at(sites=[A]).vectors) == [A]
    plain = knob.with_(operation="add")
    assert (plain.kernel, plain.tuning) == (None, None)
    with pytest.raises(KnobError, match=r"Operation 'kernel' goes with examples, .* examples: none"):
        plain.with_(operation="kernel")
    assert knob.with_(operation="kernel").kernel is knob.kernel
    with pytest.raises(KnobError, match="Only knobs that add can be summed"):
        _ = knob + knob
    with pytest.raises(KnobError, match="Only knobs that add can be summed"):
        _ = knob - plain


@pytest.mark.quick
def test_a_piecewise_knob_is_turned_around_by_its_strength_alone() -> None:
    knob, state = pico.knob(1, operation="piecewise", width=D), noise(9, D)
    torch.testing.assert_close(added(3 * knob, state, 1.0), added(knob, state, 3.0))
    with pytest.raises(KnobError, match="the same along a direction and against it: set a negative strength instead"):
        _ = -knob
    assert "piecewise at all tokens" in knob.card()
    assert "towards the side of the direction on which the token lies" in knob.card()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kernel_knob(kernel=None), "examples: none"),
        (
            lambda: kernel_knob(operation="add"),
            "operation 'add', and examples: a kernel softmax at temperature 0.5",
        ),
        (
            lambda: kernel_knob(kernel=examples()),
            "where there are vectors, and nowhere else; 2/last_prompt has",
        ),
        (lambda: kernel_knob(vectors={A: noise(0, 3), B: noise(0, 3)}), "width 3, and the examples of the kernel 12"),
        (lambda: examples(kind="unit"), "that is a knob with operation 'add'"),
        (lambda: examples(temperature=0.0), "temperature of a softmax kernel is above 0"),
        (lambda: examples(temperature=math.nan), "from 1e-06 to 1e.06; got nan"),
        (lambda: examples(keys={}), "keys of 0, values of 1, scales of 1 sites"),
        (lambda: examples(keys={A: noise(0, D)}), r"one shape \[N, D\] at every site; those of site 1/last_prompt"),
        (lambda: examples(values={A: noise(0, N, D - 1)}), r"values .* one shape \[N, D\] .* have \[7, 11\]"),
        (lambda: examples(keys={A: noise(0, 0, D)}), r"one shape \[N, D\]"),
        (lambda: examples(values={A: torch.full((N, D), math.inf)}), "values of site 1/last_prompt hold values that"),
        (lambda: examples(scales={A: -1.0}), "finite and not negative; got -1.0"),
        (lambda: examples(scales={A: math.nan}), "finite and not negative; got nan"),
        (lambda: examples(scales={A: 1e-300}), "too small for values as large as"),
    ],
)
def test_a_kernel_that_makes_no_sense_is_an_error(make: Any, message: str) -> None:
    with pytest.raises(KnobError, match=message):
        make()


@pytest.mark.quick
def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="Known: cosine, linear, softmax, unit"):
        examples(kind="rbf")


@pytest.mark.quick
def test_examples_that_ask_for_nothing_add_nothing() -> None:
    nothing = KernelExamples.weigh("cosine", 3.0, {A: noise(0, N, D)}, {A: torch.zeros(N, D)})
    assert (nothing.scales[A], nothing.temperature) == (0.0, 1.0)
    assert not nothing.scaled(A).any()
    assert str(nothing) == "kernel cosine over 7 examples"
    assert torch.equal(examples().reversed().values[A], -examples().values[A])
    assert str(examples(**{part: {A: noise(0, 1, D)} for part in ("keys", "values")})) == "kernel cosine over 1 example"


# --- learning and tuning ----------------------------------------------------------------------------------------------


def pairs(n: int = 4) -> Pairs:
    return Pairs(Pair((Message("user", f"q{i}" * (i + 1)),), f"yes{'!' * i}", f"no{'?' * i}") for i in range(n))


@pytest.mark.parametrize("kernel", DEPENDENT)
def test_learning_keeps_the_examples_and_their_mean(kernel: Kernel) -> None:
    lm, words = pico.model(), pico.tokenizer()
    plain = learn(lm, words, pairs(), method="cold-kernel")
    assert (plain.operation, plain.kernel) == ("add", None)
    options: dict[str, Any] = {"kernel": kernel, **({"temperature": 0.5} if kernel == "softmax" else {})}
    knob = learn(lm, words, pairs(), method="cold-kernel", options=options)
    assert knob.operation == "kernel"
    assert knob.kernel is not None
    assert (knob.site, knob.gain, knob.norms) == (plain.site, plain.gain, plain.norms)
    assert (knob.kernel.kind, knob.kernel.count) == (kernel, 4)
    assert knob.kernel.temperature == (0.5 if kernel == "softmax" else 1.0)
    text = Renderer(words).full(pairs()[2].prompt, "yes")
    for site, values in knob.kernel.values.items():
        torch.testing.assert_close(values.sum(0), plain.vectors[site], atol=1e-6, rtol=1e-4)
        with Adapter(lm).read([site.layer]) as seen, torch.no_grad():
            lm(torch.tensor([text.ids[: text.response_start]]))
        torch.testing.assert_close(knob.kernel.keys[site][2], seen.acts[site.layer][0, -1], atol=1e-5, rtol=1e-5)
        keys = knob.kernel.keys[site].double()
        weights = [by_hand(key, keys, kernel, 0.5) for key in keys]
        sums = torch.tensor(weights, dtype=torch.float64) @ values.double()
        assert knob.kernel.scales[site] == pytest.approx(float(sums.norm(dim=-1).mean()), rel=1e-4)
    raw = learn(lm, words, pairs(), method="cold-kernel", options=options, scale="raw")
    assert raw.gain == pytest.approx(raw.raw_gain(raw.site))


def test_an_unknown_kernel_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["trimtab.learn"], "capture_gradients", lambda *_, **__: pytest.fail("it was read"))
    for options, error in (({"kernel": "rbf"}, UnknownName), ({"kernel": "softmax", "temperature": 0}, OptionError)):
        with pytest.raises(error):
            learn(pico.model(), pico.tokenizer(), pairs(), method="cold-kernel", options=options)


def test_tuning_chooses_a_site_and_keeps_its_examples(tmp_path: Path) -> None:
    lm, words = pico.model(), pico.tokenizer()
    knob = learn(lm, words, pairs(6), method="cold-kernel", options={"kernel": "cosine"})
    held = Pairs(Pair((Message("user", f"Ask {i}?"),), "yes", "no, never") for i in range(4))
    options: dict[str, Any] = {"gains": (0.2, 1.0), "broken_budget": 1.0, "agreement": -1.0}
    options |= {"checkpoint": tmp_path, "strengths": (-1.0, 1.0)}
    task = Task("yes", ("Ask",), lambda answers: [1.0 for _ in answers], max_new_tokens=2)
    with pytest.warns(TrimtabWarning, match="scores above the base model"):
        tuned = tune(knob, lm, words, held, task=task, **options)
    assert tuned.kernel is not None
    assert knob.kernel is not None
    assert list(tuned.kernel.keys) == list(tuned.vectors) == [tuned.site]
    assert torch.equal(tuned.kernel.values[tuned.site], knob.kernel.values[tuned.site])
    assert tuned.tuning is not None
    assert len({row["site"] for row in tuned.tuning["ranking"]}) == len(knob.vectors) > 1
    other = learn(lm, words, pairs(6), method="cold-kernel", options={"kernel": "linear"})
    with pytest.raises(OptionError, match="another job: knob's kernel"):
        tune(other, lm, words, held, task=task, **options)


def test_tuning_leaves_out_the_examples_of_sites_that_the_pairs_do_not_agree_on() -> None:
    lm, words = pico.model(), pico.tokenizer()
    knob = learn(lm, words, pairs(6), method="cold-kernel", options={"kernel": "softmax"})
    kept, *others = knob.vectors
    sites = {str(site): {"split_half_cosine": 1.0 if site == kept else 0.0} for site in (kept, *others)}
    held = Pairs(Pair((Message("user", f"Ask {i}?"),), "yes", "no, never") for i in range(4))
    tuned = tune(
        knob.with_(diagnostics={"sites": sites}), lm, words, held, gains=(0.2,), agreement=0.5, dose_response=False,
        broken_budget=1.0,
    )  # fmt: skip
    assert tuned.site == kept
    assert tuned.tuning is not None
    assert {row["site"] for row in tuned.tuning["ranking"]} == {str(kept)}


@pytest.mark.parametrize("kernel", DEPENDENT)
def test_a_preference_of_the_bundled_world_is_followed_and_reversed(kernel: Kernel) -> None:
    lm, words = trimtab.load("prefworld")
    options: dict[str, Any] = {"kernel": kernel, **({"temperature": 0.5} if kernel == "softmax" else {})}
    knob = trimtab.learn(lm, words, world.pairs("risk", 24), method="cold-kernel", options=options)
    test = world.pairs("risk", 24, split="validation")
    minus, base, plus = (m.margin.mean() for m in pair_margins(lm, words, test, [{knob: s} for s in (-1, 0, 1)]))
    assert minus < base - 0.5 < base + 0.5 < plus
