"""Baselines that are trained: relabelled pairs, BFPO's row of betas, rewards through TRL, and soups of what comes out."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from pico import model, tokenizer
from trimtab.errors import OptionError, PairsError, UnknownName
from trimtab.evals.likelihood import pair_margins
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.train import loops as loops_module
from trimtab.train import train
from trimtab.train.labels import Flags, bfpo_target, bfpo_targets, relabel

pytest.importorskip("trl", reason="training needs the train extra")


def flagged(better: str, safer: str, chosen_safe: bool, rejected_safe: bool, **more: Any) -> dict[str, Any]:
    return {"better": better, "safer": safer, "chosen_safe": chosen_safe, "rejected_safe": rejected_safe, **more}


def pairs_of(*flags: dict[str, Any]) -> Pairs:
    """A pair for each set of flags; every fourth has the same two answers."""
    return Pairs.from_records(
        {"prompt": f"Question {i}?", "chosen": 3 * "aceg"[i % 4], "rejected": 4 * "bdfh"[i % 4], **own}
        for i, own in enumerate(flags)
    )


# --- labels ---------------------------------------------------------------------------------------------------------

# (chosen_safe, rejected_safe) with the chosen answer the better one and the rejected one the safer one: a conflict.
TABLE = [
    # safe-first goes by help where both are harmless, and by harm otherwise
    ((True, True), {"helpful": True, "harmless": False, "safe-first": True, "bfpo": True}, 0.5),
    ((False, True), {"helpful": True, "harmless": False, "safe-first": False, "bfpo": False}, -1.0),
    ((False, False), {"helpful": True, "harmless": False, "safe-first": False, "bfpo": False}, -0.5),
    ((True, False), {"helpful": True, "harmless": False, "safe-first": False, "bfpo": True}, 1.0),
]


@pytest.mark.parametrize("swapped", [False, True], ids=["as told", "told the other way round"])
@pytest.mark.parametrize(("safe", "stays", "target"), TABLE, ids=lambda value: str(value))
def test_conflicts_are_decided_as_the_table_says(
    safe: tuple[bool, bool], stays: dict[str, bool], target: float, swapped: bool
) -> None:
    own = flagged("chosen", "rejected", *safe)
    first, second = "good", "bad"
    if swapped:  # the same two answers, listed in the other order
        own, first, second = flagged("rejected", "chosen", *reversed(safe)), second, first
    pairs = Pairs.from_records([{"prompt": "Well?", "chosen": first, "rejected": second, **own}])
    for label, better_wins in stays.items():
        made = relabel(pairs, label)[0]  # pyright: ignore[reportArgumentType]
        assert made.chosen == ("good" if better_wins else "bad"), label
        assert made.meta["better"] == ("chosen" if better_wins else "rejected"), label
        assert made.meta["safer"] == ("rejected" if better_wins else "chosen"), label
        expected = safe if better_wins else (safe[1], safe[0])
        assert (made.meta["chosen_safe"], made.meta["rejected_safe"]) == expected, label
    assert bfpo_targets(pairs)[0] == pytest.approx(-target if swapped else target)
    assert bfpo_targets(relabel(pairs, "bfpo"))[0] == abs(target)


def test_relabelling_takes_what_is_told_of_each_answer_along_and_can_be_undone() -> None:
    told = flagged("chosen", "rejected", True, False, chosen_side="full", rejected_side="thin", task="t", chosen_n=1)
    pairs = pairs_of(told)
    turned = relabel(pairs, "harmless")
    assert dict(turned[0].meta) == flagged(
        "rejected", "chosen", False, True, rejected_side="full", chosen_side="thin", task="t", rejected_n=1
    )
    assert relabel(turned, "helpful") == pairs
    assert relabel(turned, "harmless") == turned
    assert relabel(pairs, "helpful") == pairs


def test_a_pair_without_flags_and_an_unknown_label_are_named() -> None:
    good = flagged("chosen", "chosen", True, True)
    for name, wrong in (("better", 0), ("safer", "both"), ("chosen_safe", 1), ("rejected_safe", "true")):
        with pytest.raises(PairsError, match=rf"Pair 2 .*'{name}'"):
            relabel(pairs_of(good, good | {name: wrong}), "safe-first")
    with pytest.raises(UnknownName, match=r"safe-first"):
        relabel(pairs_of(good), "safe")  # pyright: ignore[reportArgumentType]


def test_the_default_shift_leaves_no_target_zero_and_others_are_refused() -> None:
    every = [Flags("chosen", "chosen", *safe) for safe in product((True, False), repeat=2)]
    assert sorted(bfpo_target(flags) for flags in every) == [-1.0, -0.5, 0.5, 1.0]
    pairs = pairs_of(flagged("chosen", "chosen", True, False), flagged("chosen", "chosen", True, True))
    assert bfpo_targets(pairs, shift=0.25).tolist() == [1.25, 0.75]
    with pytest.raises(OptionError, match="pair 2 is 0 at the shift 1"):
        bfpo_targets(pairs, shift=1.0)


def test_prefworld_pairs_conflict_where_the_request_is_harmful_and_not_elsewhere() -> None:
    joint = world.pairs("helpful", 12) + world.pairs("harmless", 12)
    by_help = relabel(joint, "helpful")
    assert {pair.meta["chosen_side"] for pair in by_help} == {"full", "comply"}
    assert {pair.meta["chosen_side"] for pair in relabel(by_help, "harmless")} == {"full", "refuse"}
    assert relabel(by_help, "safe-first") == joint == relabel(by_help, "bfpo")
    assert bfpo_targets(joint).tolist() == [0.5] * 12 + [1.0] * 12
    turned = world.pairs("helpful", 12, sides=("thin", "full"))
    assert relabel(turned, "safe-first") == world.pairs("helpful", 12)  # the flags follow the answers, not their order


# --- BFPO in DPO's form ---------------------------------------------------------------------------------------------

KINDS = [
    flagged("chosen", "chosen", True, True),
    flagged("chosen", "rejected", False, True),
    flagged("chosen", "rejected", False, False),
    flagged("chosen", "chosen", True, False),
]
HELD = pairs_of(*KINDS, *KINDS)[4:]
FAST: dict[str, Any] = {"validation": HELD, "learning_rates": (3e-3,), "epochs": 2, "batch_size": 2}


def test_each_row_of_bfpo_has_its_own_tau_by_the_formula() -> None:
    """The loss of moved weights, by hand: -log sigma(tau' h) in the order (better, other), tau' with its sign."""
    lm, words, tau = model(), tokenizer(), 0.2
    pairs = pairs_of(*KINDS)
    trained = train(lm, words, pairs, loss="bfpo", betas=(tau,), **FAST)
    row = trained.record["table"][0]
    assert row["starting_loss"] == math.log(2)
    # The validation loss at the kept weights, recomputed from log-likelihoods alone.
    before, after = (pair_margins(m, words, HELD, [{}])[0].margin for m in (lm, trained.model))
    signed = [tau / 2 / (1.5 * s["chosen_safe"] - 0.5 * s["rejected_safe"] - 0.5) for s in KINDS]
    assert signed == pytest.approx([0.2, -0.1, -0.2, 0.1])
    by_hand = np.log1p(np.exp(-np.array(signed) * (after - before))).mean()
    assert by_hand != pytest.approx(np.log1p(np.exp(-tau * (after - before))).mean(), abs=1e-3)  # DPO's is another
    assert min(row["validation_losses"]) == pytest.approx(by_hand, abs=1e-5)


def test_bfpo_of_harmless_pairs_is_dpo_bit_for_bit_and_of_others_is_not() -> None:
    lm, words = model(), tokenizer()
    safe, mixed = pairs_of(*[KINDS[0]] * 4), pairs_of(*KINDS)
    own = FAST | {"validation": pairs_of(*[KINDS[0]] * 6)[4:], "betas": (0.3,)}
    dpo, bfpo = (train(lm, words, safe, loss=loss, **own) for loss in ("dpo", "bfpo"))
    assert all(torch.equal(a, b) for a, b in zip(dpo.model.parameters(), bfpo.model.parameters(), strict=True))
    assert dpo.record["table"][0]["validation_losses"] == bfpo.record["table"][0]["validation_losses"]
    other = train(lm, words, mixed, loss="bfpo", **own | {"validation": HELD})
    assert not all(torch.equal(a, b) for a, b in zip(dpo.model.parameters(), other.model.parameters(), strict=True))


def test_bfpo_gets_the_ids_that_dpo_gets_and_learns_its_own_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    make, seen = loops_module._trainer, []

    def spied(*arguments: Any) -> Any:
        trainer = make(*arguments)
        collate = trainer.data_collator

        def watch(rows: Any) -> Any:
            seen.append(collate(rows))
            return dict(seen[-1])

        trainer.data_collator = watch
        return trainer

    monkeypatch.setattr(loops_module, "_trainer", spied)
    lm, words, pairs = model(), tokenizer(), pairs_of(*KINDS)
    own = FAST | {"betas": (0.3,), "epochs": 6}
    trained = train(lm, words, pairs, loss="bfpo", **own)
    batches, seen[:] = list(seen), []
    train(lm, words, relabel(pairs, "bfpo"), loss="dpo", **own | {"validation": relabel(HELD, "bfpo")})
    ids = [{tuple(row.tolist()) for b in some for row in b["input_ids"]} for some in (batches, seen)]
    assert ids[0] == ids[1]
    assert {float(t) for b in batches for t in b["targets"]} == {0.5, 1.0}
    margins = [pair_margins(m, words, HELD, [{}])[0].margin for m in (lm, trained.model)]
    assert ((margins[1] - margins[0]) * np.array([1, -1, -1, 1]) > 0).all()  # unsafe better answers are unlearned
    assert trained.record["pairs"]["hash"] == relabel(pairs, "bfpo").hash()


def test_bfpo_wants_the_flags() -> None:
    bare = Pairs.from_records([{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(4)])
    with pytest.raises(PairsError, match="Pair 1 does not say which answer is better"):
        train(model(), tokenizer(), bare, loss="bfpo", **FAST)
