"""Methods on tensors: planted truth, algebra, and one contract for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.errors import OptionError, UnknownName
from trimtab.methods import METHODS, Method
from trimtab.methods.palrs import palrs_layer
from trimtab.ops import cosine, split_half_cosine

pytestmark = pytest.mark.quick
N, S, D = 60, 3, 24
EVIDENCE = [name for name in METHODS if name != "random"]
DIFFERENCES = [name for name in EVIDENCE if METHODS[name].evidence == "activations"]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(delta: Tensor, *, n: int = N, scale: float = 1.0, offset: float = 5.0) -> tuple[Tensor, Tensor]:
    """Pairs that share a component of their own and differ by `delta [S, D]` and noise."""
    shared = offset + 3 * noise(1, n, *delta.shape)
    chosen = shared + delta + 0.2 * scale * noise(2, n, *delta.shape)
    return chosen, shared + 0.2 * scale * noise(3, n, *delta.shape)


def run(name: str, chosen: Tensor, rejected: Tensor, **options: object) -> Tensor:
    return METHODS[name].run(chosen, rejected, options)


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def test_every_method_is_listed_under_its_name_with_a_summary(method: Method) -> None:
    assert METHODS[method.name] is method
    assert method.summary
    assert method.paper.startswith("arXiv:") or method.name == "random"


def test_vectors_are_one_float64_row_per_site(method: Method) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        chosen, rejected = planted(noise(0, S, D))
        vectors = method.run(chosen.to(dtype), rejected.to(dtype), {})
        assert vectors.dtype == torch.float64
        assert vectors.shape == (S, D)


def test_inputs_are_left_alone_and_runs_repeat(method: Method) -> None:
    chosen, rejected = planted(noise(0, S, D))
    before = chosen.clone(), rejected.clone()
    assert torch.equal(method.run(chosen, rejected, {}), method.run(chosen, rejected, {}))
    assert torch.equal(chosen, before[0])
    assert torch.equal(rejected, before[1])


def test_sites_do_not_see_each_other(method: Method) -> None:
    if method.name == "icv":  # one component over all layers: see the test below
        return
    chosen, rejected = planted(noise(0, S, D))
    alone = [method.run(chosen[:, :1], rejected[:, :1], {}), method.run(chosen, rejected, {})[:1]]
    torch.testing.assert_close(*alone)


def test_icv_is_the_first_component_of_all_sites_laid_end_to_end() -> None:
    chosen, rejected = planted(noise(0, S, D))
    flat = run("icv", chosen.reshape(N, 1, S * D), rejected.reshape(N, 1, S * D))
    torch.testing.assert_close(run("icv", chosen, rejected).reshape(1, -1), flat)
    torch.testing.assert_close(flat, run("pca", chosen.reshape(N, 1, S * D), rejected.reshape(N, 1, S * D)))
    assert not torch.allclose(run("icv", chosen, rejected), run("pca", chosen, rejected), rtol=1e-3)


def test_cold_kernel_is_minus_the_mean_gradient_whatever_the_kernel() -> None:
    gradients, activations = noise(0, N, S, D), noise(1, N, S, D)
    for kernel in ("unit", "cosine", "softmax", "linear"):
        torch.testing.assert_close(
            run("cold-kernel", gradients, activations, kernel=kernel), -gradients.double().mean(0)
        )
    with pytest.raises(UnknownName, match=r"Unknown kernel 'wat'\. Known: cosine, linear, softmax, unit"):
        run("cold-kernel", gradients, activations, kernel="wat")
    with pytest.raises(OptionError, match=r"temperature of a softmax kernel is above 0, from 1e-06 to 1e\+06; got -1"):
        run("cold-kernel", gradients, activations, temperature=-1.0)
    with pytest.raises(OptionError, match="'kernel' of method cold-kernel is text; got 1"):
        run("cold-kernel", gradients, activations, kernel=1)


def test_alike_answers_give_a_zero_vector(method: Method) -> None:
    same = noise(0, N, S, D)
    first = torch.zeros_like(same) if method.evidence == "gradients" else same.clone()  # then there is no gradient
    assert torch.equal(method.run(first, same, {}), torch.zeros(S, D, dtype=torch.float64))


def test_unknown_option_is_an_error_listing_known_ones(method: Method) -> None:
    chosen, rejected = planted(noise(0, S, D))
    with pytest.raises(UnknownName, match=f"Unknown option of method {method.name} 'wat'. Known: "):
        method.run(chosen, rejected, {"wat": 1})


@pytest.mark.parametrize("shapes", [((4, 3), (4, 3)), ((2, 3, 4), (2, 3, 5)), ((0, 3, 4), (0, 3, 4))])
def test_wrong_shapes_are_an_error_that_names_them(method: Method, shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(OptionError, match=r"\[N, S, D\] of one shape"):
        method.run(torch.zeros(shapes[0]), torch.zeros(shapes[1]), {})


@pytest.mark.parametrize("name", DIFFERENCES)
def test_planted_direction_is_recovered_with_its_length(name: str) -> None:
    delta = noise(0, S, D)
    vectors = run(name, *planted(delta))
    for found, truth in zip(vectors, delta, strict=True):
        assert cosine(found, truth) > 0.99
        assert found.norm().item() == pytest.approx(truth.norm().item(), rel=0.05)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_swapped_answers_turn_the_vector_around(name: str) -> None:
    chosen, rejected = planted(noise(0, S, D))
    torch.testing.assert_close(run(name, rejected, chosen), -run(name, chosen, rejected))


@pytest.mark.parametrize("name", EVIDENCE)
def test_order_and_repetition_of_pairs_do_not_matter(name: str) -> None:
    chosen, rejected = planted(noise(0, S, D))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).repeat(2)
    torch.testing.assert_close(run(name, chosen[order], rejected[order]), run(name, chosen, rejected))


@pytest.mark.parametrize("name", EVIDENCE)
@pytest.mark.parametrize("n", [5, 100])
def test_scaled_activations_scale_the_vector(name: str, n: int) -> None:
    chosen, rejected = planted(noise(0, S, D), n=n)
    torch.testing.assert_close(run(name, 8 * chosen, 8 * rejected), 8 * run(name, chosen, rejected))


@pytest.mark.parametrize("name", ["palrs", "diffmean"])
def test_float64_means_agree_with_a_two_pass_computation_under_a_huge_offset(name: str) -> None:
    chosen, rejected = planted(0.01 * noise(0, S, D), offset=1e4, n=500)
    expected = (chosen.double() - rejected.double()).mean(0)
    torch.testing.assert_close(run(name, chosen, rejected), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffmean_equals_the_mean_of_the_pairs_differences_computed_one_by_one(dtype: torch.dtype) -> None:
    chosen, rejected = (acts.to(dtype) for acts in planted(noise(0, S, D), offset=100.0))
    reference = np.zeros((S, D))
    for plus, minus in zip(chosen.float().numpy(), rejected.float().numpy(), strict=True):
        reference += (plus.astype(np.float64) - minus.astype(np.float64)) / N
    difference = run("diffmean", chosen, rejected).numpy() - reference
    assert (np.linalg.norm(difference, axis=1) < 1e-6 * np.linalg.norm(reference, axis=1)).all()


def test_palrs_equals_the_papers_means_of_the_two_sides() -> None:
    chosen, rejected = planted(noise(0, S, D), offset=100.0)
    mu_plus = sum(plus.astype(np.float64) for plus in chosen.numpy()) / N  # Eq. 1
    mu_minus = sum(minus.astype(np.float64) for minus in rejected.numpy()) / N  # Eq. 2
    difference = run("palrs", chosen, rejected).numpy() - (mu_plus - mu_minus)
    assert (np.linalg.norm(difference, axis=1) < 1e-6 * np.linalg.norm(mu_plus - mu_minus, axis=1)).all()


def test_palrs_and_caa_are_the_same_mean_difference() -> None:
    chosen, rejected = planted(noise(0, S, D))
    assert torch.equal(run("palrs", chosen, rejected), run("diffmean", chosen, rejected))


@pytest.mark.parametrize("name", ["palrs", "diffmean"])
def test_equal_weight_keeps_the_direction_and_takes_it_from_what_shuffled_pairs_leave(name: str) -> None:
    # Pairs that differ alike, but by lengths between 0.2 and 1.8.
    delta, far = noise(0, S, 200), 0.2 + 1.6 * torch.rand(100, 1, 1, generator=torch.Generator().manual_seed(1))
    rejected = noise(2, 100, S, 200)
    chosen = rejected + far * (delta + 0.1 * noise(3, 100, S, 200))
    plain, even = run(name, chosen, rejected), run(name, chosen, rejected, equal_weight=True)
    torch.testing.assert_close(even.norm(dim=-1), plain.norm(dim=-1))
    assert min(cosine(a, b) for a, b in zip(even, delta, strict=True)) > 0.99

    def left(equal_weight: bool) -> float:
        found: list[float] = []
        for seed in range(20):
            swap = torch.zeros(100, 1, 1, dtype=torch.bool)
            swap[torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:50]] = True
            sides = torch.where(swap, rejected, chosen), torch.where(swap, chosen, rejected)
            found += [
                abs(cosine(v, d)) for v, d in zip(run(name, *sides, equal_weight=equal_weight), delta, strict=True)
            ]
        return sum(found) / len(found)

    assert left(equal_weight=False) > 0.5
    assert left(equal_weight=True) < 0.1


def test_equal_weight_counts_pairs_that_do_not_differ_for_nothing() -> None:
    chosen, rejected = planted(noise(0, S, D))
    same = noise(5, 90, S, D)
    nearly = same + 1e-7 * noise(6, 90, S, D)
    more = run("palrs", torch.cat([chosen, same]), torch.cat([rejected, nearly]), equal_weight=True)
    for a, b in zip(more, run("palrs", chosen, rejected, equal_weight=True), strict=True):
        assert cosine(a, b) == pytest.approx(1.0)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("n", [10, 100])
def test_pca_equals_the_leading_right_singular_vector(n: int, center: bool) -> None:
    chosen, rejected = planted(noise(0, S, D), n=n)
    for site, found in enumerate(run("pca", chosen, rejected, center=center).numpy()):
        differences = (chosen.double() - rejected.double())[:, site].numpy()
        mean = differences.mean(axis=0)
        leading = np.linalg.svd(differences - mean if center else differences)[2][0]
        expected = (leading @ mean) * leading
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_centred_pca_finds_how_pairs_differ_from_each_other_instead() -> None:
    shared, own = torch.zeros(1, D), torch.zeros(1, D)
    shared[0, 0], own[0, 1] = 5.0, 2.0
    rejected = noise(0, N, 1, D)
    chosen = rejected + shared + own * noise(1, N, 1, 1) + 0.05 * noise(2, N, 1, D)
    assert abs(cosine(run("pca", chosen, rejected)[0], shared[0])) > 0.99
    centred = run("pca", chosen, rejected, center=True)[0]
    assert abs(cosine(centred, own[0])) > 0.99
    assert centred @ (chosen - rejected).double().mean(0)[0] >= 0  # the sign is the mean difference's


def test_random_directions_have_the_norm_of_the_mean_difference_and_nothing_of_its_direction() -> None:
    chosen, rejected = planted(noise(0, S, 400))
    truth = run("palrs", chosen, rejected)
    draws = [run("random", chosen, rejected, seed=seed) for seed in range(5)]
    for drawn in draws:
        torch.testing.assert_close(drawn.norm(dim=-1), truth.norm(dim=-1))
        assert max(abs(cosine(a, b)) for a, b in zip(drawn, truth, strict=True)) < 0.25
    assert abs(cosine(draws[0][0], draws[1][0])) < 0.25
    assert abs(cosine(draws[0][0], draws[0][1])) < 0.25


def test_balanced_label_flips_leave_no_direction() -> None:
    chosen, rejected = planted(noise(0, 1, 128) * 0.2, n=100, scale=5.0)
    differences = (chosen - rejected)[:, 0].double()
    signs = torch.ones(100, dtype=torch.float64)
    signs[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:50]] = -1
    assert (split_half_cosine(differences) or 0.0) > 0.5
    assert abs(split_half_cosine(differences * signs[:, None]) or 1.0) < 0.15


def test_palrs_layer_zero_is_an_error_that_explains_why() -> None:
    assert [palrs_layer(layer) for layer in (1, 8)] == [0, 7]
    with pytest.raises(OptionError, match=r"embedding.*difference is exactly zero"):
        palrs_layer(0)
    with pytest.raises(OptionError, match="got -1"):
        palrs_layer(-1)
