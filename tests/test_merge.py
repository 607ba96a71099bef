"""Rules that combine weight differences: planted truth, algebra, and what the papers' equations give by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trimtab.errors import OptionError
from trimtab.weights.merge import (
    MERGES,
    MergeRule,
    cosine_matrix,
    dare,
    linear,
    norm_matched,
    sign_conflict,
    singular_task_interference,
    slerp,
    task_arithmetic,
    ties,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", MERGES.values(), ids=MERGES.keys())
def test_every_rule_leaves_alike_differences_as_they_are(rule: MergeRule) -> None:
    delta = drawn(6, 5)
    if rule is dare:
        found = torch.stack([dare([delta, delta], [0.5, 0.5], density=0.5, seed=s) for s in range(400)]).mean(0)
        assert torch.allclose(found, delta, atol=0.35)
        return
    found = ties([delta, delta], [1.0, 1.0], density=1.0) if rule is ties else rule([delta, delta], [0.5, 0.5])
    assert torch.allclose(found, delta, atol=1e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("rule", MERGES.values(), ids=MERGES.keys())
def test_every_rule_refuses_shapes_that_differ_and_lone_weights(rule: MergeRule) -> None:
    with pytest.raises(OptionError, match="one shape"):
        rule([drawn(2, 3), drawn(3, 2)], [1.0, 1.0])
    with pytest.raises(OptionError, match="needs a weight"):
        rule([drawn(2, 3)], [1.0, 1.0])


@pytest.mark.parametrize("rule", MERGES.values(), ids=MERGES.keys())
def test_no_rule_changes_what_it_is_given(rule: MergeRule) -> None:
    deltas = [drawn(4, 4), drawn(4, 4, seed=1)]
    before = [delta.clone() for delta in deltas]
    rule(deltas, [0.7, 0.3])
    assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))


def test_task_arithmetic_is_linear_and_takes_negative_weights() -> None:
    a, b = drawn(3, 3), drawn(3, 3, seed=1)
    assert torch.allclose(task_arithmetic([a, b], [2.0, -0.5]), 2 * a - 0.5 * b)
    assert torch.equal(task_arithmetic([a], [0.0]), torch.zeros(3, 3))


def test_half_precision_is_summed_in_float32() -> None:
    small = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    total = task_arithmetic([small] * 1000, [1.0] * 1000)
    assert torch.allclose(total, torch.full((4,), float(small[0]) * 1000), rtol=1e-4)


def test_a_mean_needs_weights_that_do_not_cancel() -> None:
    with pytest.raises(OptionError, match="task-arithmetic"):
        linear([drawn(2), drawn(2)], [1.0, -1.0])


def test_ties_keeps_the_largest_entries_and_averages_those_that_agree() -> None:
    deltas = [torch.tensor([4.0, 0.1, -3.0, 0.2]), torch.tensor([2.0, -0.1, 1.0, 0.3])]
    # By hand: half of each stays: [4, 0, -3, 0] and [2, 0, 1, 0]; signs elected +, 0, -, 0.
    assert ties(deltas, [1.0, 1.0], density=0.5).tolist() == [3.0, 0.0, -3.0, 0.0]
    # A weight of 4 turns the election of the third entry.
    assert ties(deltas, [1.0, 4.0], density=0.5).tolist()[2] == 1.0
    assert ties([deltas[0]], [-1.0], density=1.0).tolist() == pytest.approx([-4.0, -0.1, 3.0, -0.2])
    with pytest.raises(OptionError, match="share of entries"):
        ties(deltas, [1.0, 1.0], density=0.0)


def test_dare_keeps_the_expected_difference_and_drops_the_share_it_should() -> None:
    delta = torch.ones(200, 200)
    found = dare([delta], [1.0], density=0.1, seed=3)
    assert set(found.unique().tolist()) == {0.0, 10.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(found, dare([delta], [1.0], density=0.1, seed=3))
    assert not torch.equal(found, dare([delta], [1.0], density=0.1, seed=4))


def test_an_arc_has_its_ends_its_middle_and_lengths_in_between() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    assert torch.allclose(slerp([a, b], [1.0, 0.0]), a)
    assert torch.allclose(slerp([a, b], [0.0, 1.0]), b, atol=1e-6)
    assert torch.allclose(slerp([a, b], [1.0, 1.0]), torch.tensor([3.0, 3.0]) / math.sqrt(2))
    assert torch.allclose(slerp([a, 3 * a], [1.0, 1.0]), 2 * a)
    with pytest.raises(OptionError, match="joins two"):
        slerp([a, b], [1.0, -1.0])


def test_the_matched_sum_has_the_mean_length_and_the_sums_direction() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    found = norm_matched([a, b], [1.0, 1.0])
    assert float(found.norm()) == pytest.approx(4.0)
    assert torch.allclose(found / found.norm(), (a + b) / (a + b).norm())
    assert torch.equal(norm_matched([a, a], [1.0, -1.0]), torch.zeros(2))


def test_interference_is_zero_for_one_and_for_orthogonal_tasks_and_grows_with_scale() -> None:
    left, right = torch.linalg.qr(drawn(8, 8).double()).Q, torch.linalg.qr(drawn(8, 8, seed=1).double()).Q
    first, second = left[:, :2] @ right[:, :2].T, left[:, 2:4] @ right[:, 2:4].T
    assert singular_task_interference([first], rank=2).raw == pytest.approx(0, abs=1e-9)
    assert singular_task_interference([first, second], rank=2).raw == pytest.approx(0, abs=1e-9)
    one, ten = (singular_task_interference([first, scale * first], rank=2) for scale in (1, 10))
    assert one.raw > 0.1
    assert ten.raw > one.raw
    assert ten.normed == pytest.approx(one.normed)
    # Twice the same rank-1 task: U^T U - I and V^T V - I are [[0, 1], [1, 0]], so the sum is that of S: 2.
    thin = left[:, :1] @ right[:, :1].T
    assert singular_task_interference([thin, thin], rank=1).raw == pytest.approx(2.0)


def test_cosines_and_sign_conflicts_are_those_of_the_whole_difference() -> None:
    a, b = [drawn(3, 3), drawn(5, seed=1)], [-drawn(3, 3), -drawn(5, seed=1)]
    found = cosine_matrix([a, b])
    assert torch.allclose(found, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))
    assert sign_conflict(a[0], b[0]) == 1.0
    assert sign_conflict(a[0], a[0]) == 0.0
    assert sign_conflict(torch.zeros(3), a[1][:3]) == 0.0
