"""Gradients at the stream and of weights: exact, of both answers at once, whatever the batch, padding and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pico
from trimtab.adapter import Adapter
from trimtab.capture import (
    GRADIENT_POSITIONS,
    GradientEvidence,
    capture,
    capture_gradients,
    residual_norms,
    weight_gradients,
)
from trimtab.capture import gradients as module
from trimtab.errors import OptionError, PairsError, TrainError, UnknownName
from trimtab.learn import STEP, learn
from trimtab.losses import IGNORED, LOSSES, answer_likelihoods, read_loss
from trimtab.methods.cold_kernel import cold_kernel
from trimtab.methods.diffmean import diffmean
from trimtab.ops import cosine
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.types import Message, Pair, Site

SURVEY = {"options": ["yes", "no", "maybe"], "shares": [3, 1, 0]}
PAIR_LOSSES = ("sft", "negative-sft", "dpo", "dpo:per=token", "simpo", "simpo:beta=1,gamma=0")


def pairs(n: int = 3) -> Pairs:
    """Pairs whose prompts and answers are all unequally long."""
    return Pairs(
        Pair((Message("user", f"q{i}" * (i + 1)),), f"yes{'!' * i}", "no" * (i + 2), meta=SURVEY) for i in range(n)
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pico.tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pico.model()


def log_likelihood(
    model: PreTrainedModel, ids: list[int], start: int, layer: int, add: Callable[[Tensor], Tensor]
) -> Tensor:
    """Run one text without padding, with something done to one block's output, and score its answer."""
    with Adapter(model).write({layer: add}):
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None]).sum()


def by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pair: Pair, layer: int, position: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both answers' log-likelihoods by a vector added where `position` says, `[D]` each."""
    found: list[Tensor] = []
    for answer in (pair.chosen, pair.rejected):
        text = Renderer(tokenizer).full(pair.prompt, answer)
        vector = torch.zeros(Adapter(model).hidden_size, requires_grad=True)
        start = text.response_start
        spans = {
            "last_prompt": slice(start - 1, start),
            "all_prompt": slice(start),
            "response_mean": slice(start, None),
        }
        tokens = torch.zeros(len(text.ids))
        tokens[spans[position]] = 1.0
        if position == "response_mean":
            tokens /= tokens.sum()

        def add(hidden: Tensor, tokens: Tensor = tokens, vector: Tensor = vector) -> Tensor:
            return hidden + tokens[:, None] * vector

        log_likelihood(model, text.ids, start, layer, add).backward()
        assert vector.grad is not None
        found.append(vector.grad)
    return found[0], found[1]


def at(evidence: GradientEvidence, layer: int, position: str) -> Tensor:
    return evidence.gradients[:, evidence.sites.index(Site(layer, position))]


# --- acceptance tests of the method's card ---------------------------------------------------------------------------


def test_unit_kernel_is_minus_the_gradient_of_an_additive_vector_at_that_position(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    knob = learn(model, tokenizer, pairs(), method="cold-kernel", site="2/last_prompt", positions="last_prompt")
    wanted = torch.stack([0.05 * (a - b) for a, b in (by_hand(model, tokenizer, p, 2, "last_prompt") for p in pairs())])
    assert cosine(knob.vectors[Site(2, "last_prompt")], wanted.mean(0)) > 0.9999
    torch.testing.assert_close(knob.vectors[Site(2, "last_prompt")], wanted.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("position", GRADIENT_POSITIONS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_pair_gradient_uses_chosen_and_rejected(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, position: str, padding: Any
) -> None:
    found = capture_gradients(model, tokenizer, pairs(), loss="dpo", positions=[position], padding=padding)
    for layer in range(Adapter(model).n_layers):
        for pair, gradient in zip(pairs(), at(found, layer, position), strict=True):
            chosen, rejected = by_hand(model, tokenizer, pair, layer, position)
            wanted = -0.05 * (chosen - rejected)  # beta / 2, at sigma = 1/2
            assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5
            assert cosine(gradient, rejected) < 0.999  # which a second capture that overwrites the first would give


def test_corollary_1_the_chosen_sides_gradient_of_squared_distance_is_the_difference_of_means(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    held = capture(model, tokenizer, pairs(), positions=["last"], format="question_response")
    chosen = held.chosen.clone().requires_grad_()
    rejected = held.rejected.clone().requires_grad_()
    (-(chosen - rejected).square().sum()).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    for ours, theirs in zip(cold_kernel(chosen.grad, chosen), diffmean(held.chosen, held.rejected), strict=True):
        assert cosine(ours, theirs) > 0.9999
    both = cold_kernel(chosen.grad + rejected.grad, held.chosen)  # over both sides nothing is left
    assert float(both.norm()) < 1e-6 * float(chosen.grad.norm())


def test_parity_with_the_released_algorithm_sft_unit_kernel_batch_1(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Batch 1, the model's own loss on labels, the block's output kept with its gradient, at the first label - 1."""
    total = torch.zeros(Adapter(model).hidden_size)
    for pair in pairs():
        text = Renderer(tokenizer).full(pair.prompt, pair.chosen)
        kept: list[Tensor] = []

        def keep(_module: object, _args: object, output: Any, kept: list[Tensor] = kept) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.retain_grad()
            kept.append(hidden)

        handle = Adapter(model).blocks[1].register_forward_hook(keep)
        labels = torch.tensor([[-100] * text.response_start + text.ids[text.response_start :]])
        model(input_ids=torch.tensor([text.ids]), labels=labels).loss.backward()
        handle.remove()
        assert kept[0].grad is not None
        total += kept[0].grad[0, text.response_start - 1] / len(pairs())
    model.zero_grad(set_to_none=True)
    knob = learn(model, tokenizer, pairs(), method="cold-kernel", loss="sft", site="1/last_prompt", scale="raw")
    assert cosine(knob.vectors[knob.site], -total) > 0.9999
    torch.testing.assert_close(knob.addend(1.0), -total, rtol=1e-4, atol=1e-7)  # eta 1 is strength 1


# --- batches, padding, models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [*PAIR_LOSSES, "distribution"])
def test_padding_and_company_do_not_matter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, loss: str
) -> None:
    def run(padding: Any, token_budget: int) -> GradientEvidence:
        return capture_gradients(
            model,
            tokenizer,
            pairs(),
            loss=loss,
            positions=GRADIENT_POSITIONS,
            layers=[0, -1],
            padding=padding,
            token_budget=token_budget,
        )

    alone = run("right", 1)
    assert len(alone.losses) == len(pairs())
    for padding in ("left", "right"):
        together = run(padding, 8192)
        assert together.sites == alone.sites
        assert len(together.losses) == 1
        for name in ("gradients", "first", "activations"):
            wanted, got = getattr(alone, name), getattr(together, name)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", pico.ARCHITECTURES)
def test_every_architecture_has_gradients_at_every_layer_and_is_left_as_it_was(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = pico.model(name)
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    found = capture_gradients(model, tokenizer, pairs(2))
    assert [site.layer for site in found.sites] == list(range(Adapter(model).n_layers))
    assert bool(found.gradients.isfinite().all())
    assert all(float(found.gradients[:, s].norm()) > 0 for s in range(len(found.sites)))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_chosen_share_and_activations_are_those_of_the_prompts_last_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = capture_gradients(model, tokenizer, pairs(), layers=[1])
    for number, pair in enumerate(pairs()):
        chosen, _ = by_hand(model, tokenizer, pair, 1, "last_prompt")
        torch.testing.assert_close(found.first[number, 0], -0.05 * chosen, rtol=1e-3, atol=1e-6)
        ids = Renderer(tokenizer).prompt_ids(pair.prompt)
        with torch.no_grad(), Adapter(model).read([1]) as reading:
            Adapter(model).run_to(1, input_ids=torch.tensor([ids]))
        torch.testing.assert_close(found.activations[number, 0], reading.acts[1][0, -1], rtol=1e-4, atol=1e-5)


def test_batches_that_do_not_fit_are_halved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = capture_gradients(model, tokenizer, pairs(4), layers=[0, 2])
    weights = weight_gradients(model, tokenizer, pairs(4), ["model.layers.0.mlp.up_proj.weight"])
    forward, sizes = module._Run._forward, list[int]()

    def narrow(self: Any, batch: Sequence[Any]) -> Any:
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("planted")
        return forward(self, list(batch))

    monkeypatch.setattr(module._Run, "_forward", narrow)
    torch.testing.assert_close(capture_gradients(model, tokenizer, pairs(4), layers=[0, 2]).gradients, whole.gradients)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    again = weight_gradients(model, tokenizer, pairs(4), ["model.layers.0.mlp.up_proj.weight"])
    torch.testing.assert_close(again, weights)
    monkeypatch.setattr(module._Run, "_forward", lambda self, batch: narrow(self, [*batch, *batch]))
    with pytest.raises(torch.OutOfMemoryError):
        capture_gradients(model, tokenizer, pairs(1))


def test_a_batch_that_runs_out_of_memory_half_way_back_counts_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    wanted = weight_gradients(model, tokenizer, pairs(), names)
    failures = [True]

    def fail(_module: object, _inputs: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output

        def once(gradient: Tensor) -> Tensor:
            if failures:
                failures.pop()
                raise torch.OutOfMemoryError("planted")
            return gradient

        hidden.register_hook(once)

    handle = Adapter(model).blocks[1].register_forward_hook(fail)
    found = weight_gradients(model, tokenizer, pairs(), names)
    handle.remove()
    assert not failures
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_finished_batches_are_taken_from_the_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = partial(capture_gradients, model, tokenizer, pairs(), token_budget=1, checkpoint=tmp_path / "kept")
    seen: list[tuple[int, int]] = []
    first = run(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(module._Run, "_forward", None)
    assert torch.equal(run().gradients, first.gradients)
    with pytest.raises(OptionError, match=r"holds another job: loss \(dpo there, sft here\)"):
        run(loss="sft")


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "sft", "distribution"])
def test_weight_gradients_are_those_of_the_mean_loss_and_leave_nothing_behind(
    tokenizer: PreTrainedTokenizerFast, loss: str
) -> None:
    model = pico.model(tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    before = [torch.full_like(p, 7.0) for p in model.parameters()]  # as a training leaves them between two steps
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient.clone()
    seen: list[int] = []
    found = weight_gradients(
        model, tokenizer, pairs(), names, loss=loss, token_budget=1, progress=lambda done, total: seen.append(done)
    )
    assert seen == [1, 2, 3]
    total = torch.zeros(())
    for number, pair in enumerate(pairs()):
        asked = read_loss(loss)
        sums: list[Tensor] = []
        for answer in asked.texts(pair, number):
            text = Renderer(tokenizer).full(pair.prompt, answer)
            ids = text.ids if loss != "distribution" else text.ids[: text.response_end]
            score = log_likelihood(model, ids, text.response_start, 0, lambda hidden: hidden)
            sums.append(score / (len(ids) - text.response_start) if loss == "sft" else score)
        if loss == "dpo":
            total = total - 0.05 * (sums[0] - sums[1]) / 3
        elif loss == "sft":
            total = total - sums[0] / 3
        else:
            total = total - (torch.tensor([0.75, 0.25, 0.0]) * torch.stack(sums).log_softmax(-1)).sum() / 3
    wanted = torch.autograd.grad(total, list(model.parameters()))
    for name, gradient in zip(names, wanted, strict=True):
        assert float((found[name] - gradient).norm()) < 1e-4 * float(gradient.norm()) + 1e-9, name
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_gradients_that_are_no_numbers_are_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model()
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(float("nan"))
    with pytest.raises(TrainError, match="gradient of the loss dpo is not finite for some"):
        capture_gradients(model, tokenizer, pairs())
    with pytest.raises(TrainError, match=r"not finite at 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        weight_gradients(model, tokenizer, pairs(), ["model.layers.0.mlp.up_proj.weight"], padding="left")


# --- losses ----------------------------------------------------------------------------------------------------------


def rows() -> tuple[Tensor, Tensor]:
    """Logits and labels of two pairs, chosen answers first, with answers of one to three tokens."""
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.full((4, 5), IGNORED)
    for row, span in enumerate([(1, 4), (2, 3), (1, 3), (0, 3)]):
        labels[row, slice(*span)] = torch.arange(*span)
    return logits.requires_grad_(), labels


def test_losses_are_their_formulas() -> None:
    logits, labels = rows()
    logps = logits.log_softmax(-1)
    sums = torch.stack([sum(logps[r, t, labels[r, t]] for t in range(5) if labels[r, t] >= 0) for r in range(4)])  # pyright: ignore[reportCallIssue, reportArgumentType]
    tokens = (labels >= 0).sum(1)
    mean = sums / tokens
    ones, shares = torch.ones(2, 2), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    wanted = {
        "sft": -(mean[0] + mean[1]),
        "sft:per=answer": -(sums[0] + sums[1]),
        "negative-sft": mean[0] + mean[1],  # of a batch of rejected answers alone
        "simpo:beta=3,gamma=0.5": -logsigmoid(3 * (mean[:2] - mean[2:]) - 0.5).sum(),
    }
    for name, value in wanted.items():
        loss = read_loss(name)
        some = slice(0, 4 if loss.answers == "both" else 2)
        torch.testing.assert_close(
            loss(logits[some], labels[some], ones if loss.answers == "both" else ones[:, :1]), value
        )
    choice = torch.stack([sums[:2], sums[2:]], 1).log_softmax(-1)
    torch.testing.assert_close(read_loss("distribution")(logits, labels, shares), -(shares * choice).sum())
    # DPO starts at log 2 with the gradient of beta / 2 times the difference.
    for name, measured in (("dpo:beta=0.4", sums), ("dpo:beta=0.4,per=token", mean)):
        value = read_loss(name)(logits, labels, ones)
        assert value.item() == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())
        (ours,) = torch.autograd.grad(value, logits, retain_graph=True)
        (theirs,) = torch.autograd.grad(-0.2 * (measured[:2] - measured[2:]).sum(), logits, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def test_any_callable_of_logits_and_labels_is_a_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    def mine(logits: Tensor, labels: Tensor) -> Tensor:
        half = len(labels) // 2
        chosen, rejected = (answer_likelihoods(logits[i], labels[i])[0] for i in (slice(half), slice(half, None)))
        return -0.05 * (chosen - rejected)

    ours = capture_gradients(model, tokenizer, pairs(), loss=mine)
    torch.testing.assert_close(ours.gradients, capture_gradients(model, tokenizer, pairs()).gradients)
    knob = learn(model, tokenizer, pairs(), method="cold-kernel", loss=mine)
    assert knob.provenance["options"]["loss"].startswith("function ")
    assert knob.provenance["options"]["loss"].endswith("test_any_callable_of_logits_and_labels_is_a_loss.<locals>.mine")
    with pytest.raises(OptionError, match="A checkpoint cannot tell the loss function"):
        learn(model, tokenizer, pairs(), method="cold-kernel", loss=mine, checkpoint="kept")

    def plain(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    assert bool(capture_gradients(model, tokenizer, pairs(), loss=plain).gradients.isfinite().all())
    with pytest.raises(OptionError, match=r"one value for each of 3 pairs, or their sum; got shape \[6, "):
        capture_gradients(model, tokenizer, pairs(), loss=lambda logits, labels: logits.sum(-1))
    with pytest.raises(OptionError, match=r"loss .*lambda.* must return a tensor that depends on the logits"):
        capture_gradients(model, tokenizer, pairs(), loss=lambda logits, labels: torch.zeros(()))


@pytest.mark.parametrize(
    ("loss", "error", "said"),
    [
        ("wat", UnknownName, r"Unknown loss 'wat'\. Known: distribution, dpo, negative-sft, sft, simpo\."),
        ("dpo:gamma=1", UnknownName, r"Unknown option of loss dpo 'gamma'\. Known: beta, per\."),
        ("dpo:per=word", UnknownName, r"Unknown per 'word'\. Known: answer, token\."),
        ("dpo:beta", OptionError, "names beta without a value, as in dpo:beta=0.1"),
        ("dpo:beta=1,beta=2", OptionError, "sets beta twice"),
        ("dpo:beta=0", OptionError, "beta is above 0; got 0"),
        ("simpo:", OptionError, r"names no option behind its colon\. Known: beta, gamma\."),
        ("simpo:gamma=x", OptionError, "gamma must be a number; got 'x'"),
        (3, OptionError, "a name or a function of logits and labels; got 3"),
    ],
)
def test_a_loss_that_is_none_is_an_error_that_lists_those_there_are(loss: Any, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        read_loss(loss)


def test_losses_read_their_text_back() -> None:
    for text in (*LOSSES, "dpo:beta=0.5,per=token"):
        assert str(read_loss(text)) == text
    assert read_loss(LOSSES["sft"]) is LOSSES["sft"]


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"options": ["a"], "shares": [1]},
        {"options": ["a", "b"], "shares": [0, 0]},
        {"options": ["a", "a"], "shares": [1, 1]},
    ],
)
def test_a_distribution_needs_options_with_shares(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, meta: dict[str, object]
) -> None:
    asked = Pairs([Pair((Message("user", "q"),), "a", "b", meta=meta)])
    with pytest.raises(PairsError, match=r"Pair 1: the loss 'distribution' needs options .* and shares"):
        capture_gradients(model, tokenizer, asked, loss="distribution")


# --- learning ---------------------------------------------------------------------------------------------------------


def test_a_gradient_knob_has_a_usual_dose_before_tuning_and_says_how_fast_the_loss_falls(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    knob = learn(model, tokenizer, pairs(), method="cold-kernel", positions=("last_prompt", "all_prompt"))
    assert knob.gain == STEP
    assert knob.norms == pytest.approx(residual_norms(model, tokenizer, pairs(), sorted(knob.norms), token_budget=100))
    falls = {site: knob.diagnostics["sites"][str(site)]["first_order"] for site in knob.vectors}
    assert knob.site == max(falls, key=lambda site: falls[site])
    for site, vector in knob.vectors.items():
        assert falls[site] == pytest.approx(float(vector.norm()) * knob.norms[site.layer], rel=1e-5)
    raw = learn(model, tokenizer, pairs(), method="cold-kernel", scale="raw")
    assert raw.gain == pytest.approx(float(raw.vectors[raw.site].norm()) / raw.norms[raw.site.layer])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"method": "palrs", "loss": "dpo"},
            OptionError,
            "methods whose evidence is gradients; got loss='dpo' for palrs",
        ),
        ({"positions": "last"}, UnknownName, r"Unknown position of gradients 'last'\. Known: all_prompt, last_prompt"),
        ({"selection": "eq3_cosine"}, UnknownName, r"Unknown selection 'eq3_cosine'\. Known: first_order, fixed"),
        ({"scale": "mean_chosen_norm"}, OptionError, "scale='mean_chosen_norm' is of methods that read answers"),
        ({"length_match": "regress"}, OptionError, "length_match='regress' is of methods that read answers"),
        ({"method": "palrs", "selection": "first_order"}, UnknownName, "Unknown selection 'first_order'"),
        ({"format": "response_as_user"}, OptionError, "answers after their questions; got format='response_as_user'"),
        ({"options": {"temperature": 7.0}}, OptionError, "A temperature is of the softmax kernel; got 7 for unit"),
    ],
)
def test_what_gradients_cannot_do_is_an_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], error: type, said: str
) -> None:
    with pytest.raises(error, match=said):
        learn(model, tokenizer, pairs(), **{"method": "cold-kernel", **options})


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"positions": ["wat"]}, UnknownName, "Unknown position of gradients 'wat'"),
        ({"positions": []}, OptionError, "There are no positions to read"),
        ({"layers": []}, OptionError, "There are no layers; name"),
        ({"token_budget": 0}, OptionError, "token_budget is a whole number, 1 or more; got 0"),
    ],
)
def test_wrong_reading_is_an_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], error: type, said: str
) -> None:
    with pytest.raises(error, match=said):
        capture_gradients(model, tokenizer, pairs(), **options)
    with pytest.raises(PairsError, match="There are no pairs"):
        capture_gradients(model, tokenizer, Pairs())


def test_a_batch_that_runs_out_of_memory_at_its_sums_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, words = pico.model(), pico.tokenizer()
    names = [name for name, _ in lm.named_parameters()]
    wanted = weight_gradients(lm, words, pairs(4), names)
    plain, calls = torch.zeros_like, list[int]()

    def short(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("made up")
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", short)
    found = weight_gradients(lm, words, pairs(4), names)
    assert len(calls) > 5
    for name in names:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-7), name
