"""Addends at fixed addresses: rows of settings, tokens of requests, and what the table holds when nobody is left."""

from __future__ import annotations

import itertools

import pytest
import torch

import pico
from trimtab.artifact import Knob
from trimtab.engines.slots import ROWS, Slots, plan
from trimtab.errors import OptionError

LAYERS, WIDTH = (1, 2), pico.WIDTH


def slots(settings: int = 2) -> Slots:
    return Slots(LAYERS, WIDTH, settings, torch.float32, "cpu")


def added(table: Slots, layer: int, rows: torch.Tensor) -> torch.Tensor:
    return table.layer(layer)[rows]


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_each_token_gets_what_its_place_asks_for_however_the_text_is_cut(start: int, tokens: int) -> None:
    prompt, knobs = 4, [pico.knob(1, where=where, seed=n) for n, where in enumerate(("all", "prompt", "completion"))]
    table, rows = slots(), torch.full((tokens + 2,), 7)
    table.take("r", plan(dict.fromkeys(knobs, 2.0)))
    table.fill(rows, "r", 1, start, tokens, prompt)
    assert rows[0] == rows[-1] == 7  # of other requests
    for row, position in zip(rows[1:-1], itertools.count(start), strict=False):
        acting = [knobs[0]] + [knobs[1]] * (position < prompt) + [knobs[2]] * (position >= prompt - 1)
        torch.testing.assert_close(added(table, 1, row), sum(knob.addend(2.0) for knob in acting))
        assert not added(table, 2, row).any()


def test_requests_of_one_setting_share_rows_and_the_last_one_leaves_zeros() -> None:
    table, setting = slots(settings=1), {pico.knob(1): 1.0, pico.knob(2, seed=1): -0.5}
    table.take("a", plan(setting))
    table.take("b", plan(dict(setting)))
    table.take("b", plan({}))  # it has its rows already
    table.drop("a")
    rows = torch.zeros(3, dtype=torch.long)
    table.fill(rows, "b", 0, 0, 3, 2)
    assert len(set(rows.tolist())) == 1  # where all tokens are treated alike
    assert added(table, 2, rows).any()
    assert not table.idle
    table.drop("b")
    table.drop("nobody")
    assert table.idle
    assert not table.table.any()


def test_a_request_without_knobs_and_one_at_strength_0_have_the_row_of_zeros() -> None:
    table, rows = slots(), torch.full((4,), 9)
    table.take("zero", plan({pico.knob(1): 0.0}))
    table.fill(rows, "zero", 0, 0, 2, 1)
    table.fill(rows, "unknown", 2, 0, 2, 1)
    assert not rows.any()
    assert table.idle


def test_as_many_settings_fit_as_were_asked_for_and_one_more_is_refused() -> None:
    def three(seed: int) -> dict[Knob, float]:
        return {pico.knob(1, where="prompt", seed=seed): 1.0, pico.knob(1, where="completion", seed=10 + seed): 1.0}

    table = slots(settings=2)
    for seed in range(2):
        table.take(str(seed), plan(three(seed)))
    before = table.table.clone()
    with pytest.raises(OptionError, match=f"All {2 * ROWS} rows of addends are in use"):
        table.take("2", plan(three(2)))
    assert torch.equal(table.table, before)
    table.drop("0")
    table.take("2", plan(three(2)))


def test_layers_of_other_workers_are_left_to_them() -> None:
    table, rows = Slots((2,), WIDTH, 1, torch.float32, "cpu"), torch.zeros(1, dtype=torch.long)
    table.take("r", plan({pico.knob(1): 1.0, pico.knob(2): 1.0}))
    table.fill(rows, "r", 0, 0, 1, 1)
    torch.testing.assert_close(added(table, 2, rows[0]), pico.knob(2).addend(1.0))
