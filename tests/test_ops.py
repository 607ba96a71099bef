"""Tensor maths against plain definitions and planted truth."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab import ops
from trimtab.errors import OptionError

pytestmark = pytest.mark.quick


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_unit_keeps_a_zero_vector_zero() -> None:
    out = ops.unit(torch.stack([torch.zeros(4), torch.full((4,), 2.0)]))
    assert out.tolist() == [[0.0] * 4, [0.5] * 4]


def test_angle_keeps_its_digits_when_small() -> None:
    tiny = 1e-7
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([math.cos(tiny), math.sin(tiny)], dtype=torch.float64)
    assert ops.angle(a, b) == pytest.approx(math.degrees(tiny), rel=1e-6)
    assert ops.angle(a, -a) == pytest.approx(180.0)


def test_top_share_of_one_massive_coordinate_is_near_one() -> None:
    vector = torch.ones(100)
    assert ops.top_share(vector) == pytest.approx(0.05)
    vector[3] = 1000.0
    assert ops.top_share(vector) > 0.99


@pytest.mark.parametrize("sizes", [(10,), (1, 9), (3, 3, 4), (1,) * 10])
def test_streamed_moments_agree_with_two_passes_for_every_batching(sizes: tuple[int, ...]) -> None:
    data = torch.randn(10, 2, 3, generator=rng()) + 1e4
    moments = ops.Moments()
    for batch in data.split(list(sizes)):
        moments.add(batch)
    assert moments.count == 10
    torch.testing.assert_close(moments.mean, data.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.variance, data.double().var(0), rtol=1e-9, atol=0)


def test_merged_moments_equal_one_stream_and_leave_the_other_alone() -> None:
    data = torch.randn(9, 4, generator=rng())
    left, right, empty = ops.Moments(), ops.Moments(), ops.Moments()
    left.add(data[:2])
    right.add(data[2:])
    before = right.mean.clone()
    left.merge(right)
    left.merge(empty)
    empty.merge(right)
    empty.add(data[:2])
    torch.testing.assert_close(left.mean, data.double().mean(0))
    torch.testing.assert_close(left.variance, data.double().var(0))
    torch.testing.assert_close(empty.mean, left.mean)
    assert right.count == 7
    assert torch.equal(right.mean, before)


def test_moments_without_observations_are_an_error() -> None:
    moments = ops.Moments()
    moments.add(torch.zeros(0, 3))
    with pytest.raises(OptionError, match="no observation"):
        _ = moments.mean
    moments.add(torch.zeros(1, 3))
    with pytest.raises(OptionError, match="at least 2 observations"):
        _ = moments.variance


def test_alpha_conversions_round_trip_and_agree_with_each_other() -> None:
    r_norm, mu_norm, n_bar = 3.0, 10.0, 12.5
    for value in (-2.0, 0.0, 0.8):
        alpha = ops.alpha_from_multiplier(value, r_norm, n_bar)
        assert ops.multiplier_from_alpha(alpha, r_norm, n_bar) == pytest.approx(value)
        alpha = ops.alpha_from_palrs(value, mu_norm, n_bar)
        assert ops.palrs_from_alpha(alpha, mu_norm, n_bar) == pytest.approx(value)
        # Eq. 4 is only a change of unit: PaLRS(alpha) is the multiplier alpha * |mu+| / |r| on the raw difference.
        assert ops.multiplier_from_alpha(alpha, r_norm, n_bar) == pytest.approx(value * mu_norm / r_norm)
    with pytest.raises(OptionError, match="mean residual norm must be a positive number"):
        ops.alpha_from_multiplier(1.0, r_norm, 0.0)


def test_auc_equals_counting_all_pairs_with_ties_as_half() -> None:
    high, low = torch.randint(0, 5, (13,), generator=rng()), torch.randint(0, 5, (7,), generator=rng(1))
    counted = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high.tolist() for b in low.tolist()]
    assert ops.auc(high, low) == pytest.approx(sum(counted) / len(counted))


def test_pairwise_cosine_equals_the_double_loop() -> None:
    rows = torch.randn(6, 5, generator=rng()).double() + 0.5
    values = [ops.cosine(rows[i], rows[j]) for i in range(6) for j in range(6) if i != j]
    with_zero = torch.cat([rows, torch.zeros(1, 5)])
    assert ops.pairwise_cosine(with_zero) == pytest.approx(sum(values) / len(values))
    assert ops.pairwise_cosine(rows[:1]) is None


def test_split_half_cosine_is_high_for_a_shared_direction_and_low_for_noise() -> None:
    noise = torch.randn(100, 32, generator=rng()).double()
    assert abs(ops.split_half_cosine(noise) or 0.0) < 0.2
    shared = ops.split_half_cosine(noise + 2.0)
    assert shared is not None
    assert shared > 0.95


def halves(n: int, draws: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    seeded = rng()
    orders = [torch.randperm(n, generator=seeded) for _ in range(draws)]
    return [(order[: n // 2], order[n // 2 :]) for order in orders]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 16, 33])
def test_split_half_cosine_and_probe_auc_equal_their_loops(n: int) -> None:
    plus, minus = (torch.randn(n, 7, generator=rng(seed)).double() + 0.3 * seed for seed in (0, 1))
    rows = plus - minus
    cosines = [ops.cosine(rows[one].mean(0), rows[other].mean(0)) for one, other in halves(n, 16)]
    assert ops.split_half_cosine(rows) == pytest.approx(sum(cosines) / 16, abs=1e-12)
    aucs: list[float] = []
    for fit, judge in ((a, b) for one, other in halves(n, 4) for a, b in ((one, other), (other, one))):
        r = rows[fit].mean(0)
        aucs.append(ops.auc(plus[judge] @ r, minus[judge] @ r))
    assert ops.probe_auc(plus, minus) == (pytest.approx(sum(aucs) / 8, abs=1e-12) if n >= 4 else None)
    assert ops.split_half_cosine(rows[:1]) is None


@pytest.mark.parametrize("n", [6, 7, 13, 22])
def test_halves_that_cancel_have_no_direction(n: int) -> None:
    rows = torch.randint(-3, 4, (3, 5), generator=rng()).double().repeat(n, 1)[:n]
    rows[1::2] *= -1  # pairs the wrong way round; sums of whole numbers are exact
    expected = [ops.cosine(rows[one].sum(0), rows[other].sum(0)) for one, other in halves(n, 16)]
    assert ops.split_half_cosine(rows) == pytest.approx(sum(expected) / 16, abs=1e-14)


def test_probe_auc_counts_answers_that_both_sides_share_as_ties() -> None:
    both = torch.randn(40, 64, generator=rng()).double()
    plus = both[torch.randint(0, 5, (40,), generator=rng(1))]
    minus = both[torch.randint(0, 5, (40,), generator=rng(2))]
    values: list[float] = []
    for fit, judge in ((a, b) for one, other in halves(40, 4) for a, b in ((one, other), (other, one))):
        r = (plus - minus)[fit].mean(0)
        scores = {tuple(row.tolist()): float(row @ r) for row in both}  # equal rows, equal scores
        high, low = ([scores[tuple(row.tolist())] for row in side[judge]] for side in (plus, minus))
        values.append(ops.auc(torch.tensor(high).double(), torch.tensor(low).double()))
    assert ops.probe_auc(plus, minus) == pytest.approx(sum(values) / 8, abs=1e-12)


def test_probe_auc_is_half_on_noise_although_it_would_separate_its_own_pairs() -> None:
    plus, minus = (torch.randn(40, 200, generator=rng(seed)).double() for seed in (0, 1))
    r = (plus - minus).mean(0)
    assert ops.auc(plus @ r, minus @ r) > 0.9  # in its own sample
    held_out = ops.probe_auc(plus, minus)
    assert held_out is not None
    assert 0.3 < held_out < 0.7
    assert ops.probe_auc(plus + 1.0, minus) == pytest.approx(1.0, abs=0.05)


def test_site_description_shows_equal_norms_as_half_the_angle_and_a_shrunk_mean_as_a_norm_gap() -> None:
    theta = math.radians(20)
    plus = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    minus = torch.tensor([[math.cos(theta), math.sin(theta), 0.0]] * 4)
    turned = ops.describe_site(plus, minus)
    assert turned["angle"] == pytest.approx(20.0, abs=1e-3)
    assert turned["cos_r_mu"] == pytest.approx(math.sin(theta / 2), abs=1e-6)
    assert turned["norm_gap"] == pytest.approx(0.0, abs=1e-6)
    shrunk = ops.describe_site(plus, 0.8 * plus)
    assert shrunk["cos_r_mu"] == pytest.approx(1.0)
    assert shrunk["norm_gap"] == pytest.approx(1.0)
    assert shrunk["relative_norm"] == pytest.approx(0.2, abs=1e-6)


def test_site_without_a_difference_has_no_cosine_instead_of_zero_by_zero() -> None:
    acts = torch.randn(8, 16, generator=rng())
    site = ops.describe_site(acts, acts.clone())
    assert site["r_norm"] == 0.0
    assert site["cos_r_mu"] is None
    assert site["probe_auc"] is None
    almost = ops.describe_site(acts, acts * (1 + 1e-7))
    assert almost["cos_r_mu"] is None


def test_regressing_lengths_out_removes_their_effect_and_keeps_the_preference() -> None:
    n, preference, slope = 200, torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])
    lengths = torch.stack(
        [torch.randint(20, 60, (n,), generator=rng()), torch.randint(5, 30, (n,), generator=rng(1))], 1
    )
    noise = [0.01 * torch.randn(n, 1, 3, generator=rng(s)) for s in (2, 3)]
    chosen = noise[0] + preference + lengths[:, :1, None] * slope
    rejected = noise[1] + lengths[:, 1:, None] * slope
    plus, minus = ops.regress_out_lengths(chosen, rejected, lengths)
    r = (plus - minus).mean(0)[0]
    torch.testing.assert_close(r, preference, atol=0.02, rtol=0)
    assert (chosen - rejected).mean(0)[0, 1] > 5  # the length effect was there


def test_lengths_that_never_vary_leave_the_activations_alone() -> None:
    chosen, rejected = torch.randn(2, 5, 1, 3, generator=rng())
    plus, minus = ops.regress_out_lengths(chosen, rejected, torch.tensor([[9, 4]] * 5))
    assert plus is chosen
    assert minus is rejected


@pytest.mark.quick
def test_halves_of_all_pairs_are_compared_where_few_are_described() -> None:
    generator = torch.Generator().manual_seed(0)
    minus = torch.randn(2048, 64, generator=generator)
    plus = minus + 0.05 + torch.randn(2048, 64, generator=generator)
    both = torch.stack([plus, minus]).double()
    every = ops.describe_site(plus, minus)
    parts = both.unflatten(1, (16, 128)).mean(2)
    few = ops.describe_site(plus[:256], minus[:256], whole=(both.mean(1), parts))
    assert few["r_norm"] == pytest.approx(every["r_norm"], rel=1e-9)
    assert few["split_half_cosine"] == pytest.approx(every["split_half_cosine"], abs=0.05)
    alone = ops.describe_site(plus[:256], minus[:256])["split_half_cosine"]
    assert alone is not None
    assert few["split_half_cosine"] > alone + 0.2
