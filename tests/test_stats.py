"""Intervals and tests: exact cases, determinism, errors, and coverage on simulated data."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest

from trimtab.errors import OptionError
from trimtab.evals import stats
from trimtab.evals.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_runs,
    cohen_kappa,
    holm,
    mcnemar,
    paired_bootstrap,
    selection_bias,
    wilson,
)

pytestmark = pytest.mark.quick


def test_identical_scores_give_exactly_zero() -> None:
    scores = np.random.default_rng(0).random(50)
    assert paired_bootstrap(scores, scores) == Interval(0.0, 0.0, 0.0)


def test_a_constant_gain_has_no_width_and_the_sign_of_b_minus_a() -> None:
    scores = np.arange(40.0)
    assert paired_bootstrap(scores, scores + 2) == Interval(2.0, 2.0, 2.0)
    assert paired_bootstrap(scores + 2, scores) == Interval(-2.0, -2.0, -2.0)


def test_swapping_the_systems_mirrors_the_interval() -> None:
    a, b = np.random.default_rng(1).random((2, 60))
    forward, backward = paired_bootstrap(a, b), paired_bootstrap(b, a)
    np.testing.assert_allclose(forward, (-backward.estimate, -backward.high, -backward.low), atol=1e-15)


def test_pairing_narrows_the_interval_of_correlated_scores() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=200)
    b = a + 0.1 * rng.normal(size=200)
    paired, shuffled = paired_bootstrap(a, b), paired_bootstrap(a, rng.permutation(b))
    assert paired.high - paired.low < 0.2 * (shuffled.high - shuffled.low)


def test_the_interval_matches_the_exact_bootstrap_of_three_items() -> None:
    difference = np.array([0.0, 1.0, 5.0])
    exact = np.sort([np.mean(sample) for sample in itertools.product(difference, repeat=3)])
    interval = paired_bootstrap(np.zeros(3), difference, draws=50_000, level=0.8)
    assert interval == pytest.approx((2.0, np.quantile(exact, 0.1), np.quantile(exact, 0.9)))


def test_same_seed_same_interval_and_another_seed_another() -> None:
    a, b = np.random.default_rng(3).random((2, 80))
    assert paired_bootstrap(a, b, seed=4) == paired_bootstrap(a, b, seed=4)
    assert paired_bootstrap(a, b, seed=4) != paired_bootstrap(a, b, seed=5)


def test_the_memory_bound_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(3).random((2, 80))
    whole = paired_bootstrap(a, b, draws=1000)
    monkeypatch.setattr(stats, "CHUNK", 80 * 7)
    assert paired_bootstrap(a, b, draws=1000) == whole


def test_a_higher_level_is_wider() -> None:
    a, b = np.random.default_rng(6).random((2, 80))
    narrow, wide = paired_bootstrap(a, b, level=0.5), paired_bootstrap(a, b, level=0.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert wilson(3, 10, level=0.5).low > wilson(3, 10, level=0.99).low


def test_booleans_count_as_zero_and_one() -> None:
    assert paired_bootstrap([False, False], [True, False]).estimate == 0.5
    assert bootstrap_mean(np.array([True, True, False, True])).estimate == 0.75


def test_bootstrap_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(7).normal(3.0, 2.0, size=2000)
    half = 1.96 * values.std() / np.sqrt(values.size)
    np.testing.assert_allclose(bootstrap_mean(values), values.mean() + np.array([0, -half, half]), atol=0.01)


def test_ninety_five_percent_covers_the_true_gain_about_that_often() -> None:
    rng, hits, runs = np.random.default_rng(8), 0, 400
    for seed in range(runs):
        a = rng.random(100) < 0.5
        flip = rng.random(100)
        b = np.where(flip < 0.3, True, np.where(flip < 0.5, False, a))  # the true gain: 0.3/2 - 0.2/2
        interval = paired_bootstrap(a, b, draws=300, seed=seed)
        hits += interval.low <= 0.05 <= interval.high
    assert 0.90 <= hits / runs <= 0.98  # 4 standard errors around 0.94


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_equals_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((successes / n, low, high), abs=5e-5)


def test_wilson_covers_the_true_share_by_exact_enumeration() -> None:
    intervals = [wilson(k, 50) for k in range(51)]
    coverage = [
        sum(comb(50, k) * p**k * (1 - p) ** (50 - k) for k in range(51) if intervals[k].low <= p <= intervals[k].high)
        for p in np.linspace(0.05, 0.95, 19)
    ]
    assert min(coverage) > 0.93
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("a", "b", "options", "words"),
    [
        ([1.0, 2.0], [1.0], {}, "same items; got 2 and 1"),
        ([], [], {}, r"got shape \[0\] for a"),
        ([1.0], [[1.0]], {}, r"got shape \[1, 1\] for b"),
        ([1.0], [float("nan")], {}, "b holds 1 that are not"),
        ([1.0], [2.0], {"level": 95}, "between 0 and 1"),
        ([1.0], [2.0], {"draws": 10}, "at least 100 draws; got 10"),
    ],
)
def test_wrong_scores_and_options_say_what_is_wrong(a: list, b: list, options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        paired_bootstrap(a, b, **options)


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 5), (0, 0)])
def test_impossible_counts_are_errors(successes: int, n: int) -> None:
    with pytest.raises(OptionError, match="Successes must be between 0 and n"):
        wilson(successes, n)


# --- McNemar and Holm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (3, 3), (8, 2), (2, 8), (40, 25)])
def test_mcnemar_is_the_two_sided_sign_test_of_the_items_that_differ(won: int, lost: int) -> None:
    same = [0] * 5 + [1] * 7
    p = mcnemar([*same, *[0] * won, *[1] * lost], [*same, *[1] * won, *[0] * lost])
    n, extreme = won + lost, abs(won - lost)
    expected = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= extreme) / 2**n
    assert p == pytest.approx(expected, rel=1e-12)


def test_mcnemar_bears_ten_thousand_items_and_wants_scores_of_0_and_1() -> None:
    assert mcnemar([0] * 10_000, [1] * 10_000) == 0.0  # 2 ** -9999 is no float
    assert mcnemar([0, 1] * 5_000, [1, 0] * 5_000) == 1.0
    with pytest.raises(OptionError, match="scores of 0 and 1"):
        mcnemar([0.5, 1], [1, 1])


def test_holm_equals_a_table_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with pytest.raises(OptionError, match=r"between 0 and 1; got 1\.2"):
        holm([0.5, 1.2])


def test_holm_keeps_the_chance_of_any_false_rejection() -> None:
    p = np.random.default_rng(0).uniform(size=(2_000, 8))
    false = np.mean([min(holm(list(row))) <= 0.05 for row in p])
    assert 0.03 < false < 0.065
    assert np.mean(p.min(axis=1) <= 0.05) > 0.3  # which is what unadjusted values do


# --- selection bias -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "changed", "best_of", "points"),
    [(100, 0.1, 5, 3.7), (100, 0.2, 10, 6.9), (100, 0.2, 30, 9.1), (160, 0.2, 100, 8.9), (1320, 0.2, 30, 2.5)],
)
def test_selection_bias_is_what_choosing_among_useless_settings_gains(
    items: int, changed: float, best_of: int, points: float
) -> None:
    random = np.random.default_rng(1)
    gains: list[float] = []
    said: list[float] = []
    for _ in range(200):  # every setting changes a share of the items, each change for better or worse by a coin
        coins = np.where(random.random((best_of, items)) < 0.5, 1.0, -1.0)
        changes = coins * (random.random((best_of, items)) < changed)
        gains.append(float(changes.mean(axis=1).max()))
        bias = selection_bias(np.zeros(items), list(changes))
        assert bias[1:3] == (best_of, items)
        said.append(bias.expected)
    assert 100 * np.mean(said) == pytest.approx(points, rel=0.03)
    assert 100 * np.mean(gains) == pytest.approx(points, rel=0.06)


def test_one_setting_is_not_chosen_and_an_even_gain_is_no_noise() -> None:
    assert selection_bias([0, 1, 0, 1], [[1, 0, 1, 0]]).expected == pytest.approx(0, abs=1e-9)
    assert selection_bias([0] * 4, [[1] * 4, [1] * 4]).expected == 0
    with pytest.raises(OptionError, match="at least one setting"):
        selection_bias([0, 1], [])


# --- agreement of labels --------------------------------------------------------------------------------------------


def test_kappa_equals_a_worked_example_and_chance_is_zero() -> None:
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: agreement .7, chance .5.
    a, b = "y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa(a, a) == 1.0
    random = np.random.default_rng(0)
    assert abs(cohen_kappa(list(random.integers(2, size=20_000)), list(random.integers(2, size=20_000)))) < 0.02
    assert np.isnan(cohen_kappa([1, 1], [1, 1]))
    with pytest.raises(OptionError, match="got 1 and 2"):
        cohen_kappa([1], [1, 2])


# --- several runs of one system -------------------------------------------------------------------------------------


def test_intervals_over_runs_cover_the_choice_of_pairs_as_well_as_of_items() -> None:
    random = np.random.default_rng(0)
    covered, naive = 0, 0
    for trial in range(150):
        base = random.random((1, 60)) < 0.3
        gains = 0.2 + 0.1 * random.standard_normal((5, 1))  # every draw of pairs has a gain of its own
        runs = np.maximum(base, random.random((5, 60)) < gains / 0.7)
        interval = bootstrap_runs([(base.astype(float), runs.astype(float))], draws=400, seed=trial)
        covered += interval.low <= 0.2 <= interval.high
        alone = paired_bootstrap(base[0], runs.mean(axis=0), draws=400, seed=trial)
        naive += alone.low <= 0.2 <= alone.high
    assert covered / 150 > 0.85
    assert naive < covered


def test_groups_that_were_asked_the_same_items_share_their_luck() -> None:
    random = np.random.default_rng(1)
    shared, apart, trials = 0, 0, 150
    for trial in range(trials):
        gains = (random.random(60) < 0.3).astype(float)  # the same items are gained in every one of three models
        groups = [(np.zeros((1, 60)), gains[None])] * 3
        interval = bootstrap_runs(groups, draws=400, seed=trial)
        shared += interval.low <= 0.3 <= interval.high
        narrow = (interval.high - interval.low) / 3**0.5 / 2  # what three independent draws of items would give
        apart += abs(gains.mean() - 0.3) <= narrow
    assert shared / trials > 0.88
    assert apart < 0.85 * trials


def test_scores_within_flags_are_means_of_the_flagged_alone() -> None:
    random = np.random.default_rng(2)
    before, after = random.random((1, 80)) < 0.5, random.random((3, 80)) < 0.5  # on the side or not
    scores = [np.where(flags, right, 0.0) for flags, right in ((before, 0.25), (after, 0.75))]
    flags = [(before.astype(float), after.astype(float))]
    interval = bootstrap_runs([(scores[0], scores[1])], within=flags)
    assert interval == pytest.approx(Interval(0.5, 0.5, 0.5))
    assert bootstrap_runs([(scores[0], scores[1])]).estimate < 0.4
    with pytest.raises(OptionError, match="at least one that is set"):
        bootstrap_runs([(scores[0], scores[1])], within=[(flags[0][0] * 0, flags[0][1])])


def test_groups_of_runs_are_averaged_and_the_same_arguments_give_the_same_interval() -> None:
    a, b = np.zeros((1, 10)), np.ones((3, 10))
    assert bootstrap_runs([(a, b)]) == pytest.approx(Interval(1.0, 1.0, 1.0))
    assert bootstrap_runs([(a, b), (a, np.zeros((2, 10)))]) == pytest.approx(Interval(0.5, 0.5, 0.5))
    mixed = np.random.default_rng(0).integers(2, size=(4, 30)).astype(float)
    one = bootstrap_runs([(mixed[:1], mixed)])
    assert one == bootstrap_runs([(mixed[:1], mixed)])
    assert one.low < one.estimate < one.high
    with pytest.raises(OptionError, match="of the same items"):
        bootstrap_runs([(a, np.ones((3, 9)))])
