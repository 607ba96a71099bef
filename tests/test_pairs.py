"""Pairs: formats, errors that name the line, splits, flips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import OptionError, PairsError
from trimtab.pairs import Pairs
from trimtab.types import Message, Pair

pytestmark = pytest.mark.quick


def record(i: int = 0, **more: object) -> dict[str, object]:
    return {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", **more}


def many(n: int = 20, per_prompt: int = 1) -> Pairs:
    return Pairs(Pair((Message("user", f"q{i // per_prompt}"),), f"good {i}", f"bad {i}") for i in range(n))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_strings_messages_and_implicit_prompts_read_as_the_same_pair() -> None:
    ask, good, bad = said("user", "Why?"), said("assistant", "Because."), said("assistant", "No.")
    forms: list[dict[str, object]] = [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": "Why?", "chosen": [ask, good], "rejected": [ask, bad]},
    ]
    expected = Pair((Message("user", "Why?"),), "Because.", "No.")
    assert [Pairs.from_records([form])[0] for form in forms] == [expected] * 4


def test_system_lines_stay_in_the_prompt_and_other_keys_go_to_meta() -> None:
    turns = [said("system", "Be brief."), said("user", "Why?")]
    pair = Pairs.from_records([{"prompt": turns, "chosen": "a", "rejected": "b", "better": 0, "id": "x"}])[0]
    assert pair.prompt[0] == Message("system", "Be brief.")
    assert pair.meta == {"better": 0, "id": "x"}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_saved_pairs_load_as_equal_pairs(tmp_path: Path, suffix: str) -> None:
    turns = [said("system", "Bé \u2028 brief."), said("user", "Why?")]
    pairs = Pairs.from_records([record(0, safe=True), {"prompt": turns, "chosen": " a\n", "rejected": "b"}])
    pairs.save(tmp_path / f"pairs.{suffix}")
    assert Pairs.load(tmp_path / f"pairs.{suffix}") == pairs


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "Line 3 has no rejected; it has prompt, chosen"),
        ({"chosen": "a", "rejected": "b"}, "Line 3 has no prompt"),
        ({"prompt": "q", "chosen": " \n", "rejected": "b"}, "Line 3: the chosen answer is empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "Line 3: the user turn of the prompt is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, "Line 3: chosen and rejected are the same answer"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "Line 3, prompt is a number"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "Line 3, prompt: a message is"),
        ({"prompt": [said("robot", "q"), said("user", "q")], "chosen": "a", "rejected": "b"}, "role 'robot' is not"),
        ({"prompt": [said("assistant", "q")], "chosen": "a", "rejected": "b"}, "must end with a user turn"),
        ({"prompt": "q", "chosen": [said("user", "q")], "rejected": "b"}, "last message must be the assistant's"),
        (
            {"chosen": [said("user", "q"), said("assistant", "a")], "rejected": [said("assistant", "b")]},
            "Line 3: chosen and rejected must share every turn",
        ),
        (
            {"prompt": "p", "chosen": [said("user", "q"), said("assistant", "a")],
             "rejected": [said("user", "q"), said("assistant", "b")]},
            "not those of the prompt",
        ),
        (record(0), "Line 3 repeats line 1"),
        ({"prompt": "question 0", "chosen": "bad 0", "rejected": "good 0"}, "Line 3 contradicts line 1"),
        ([1], "Line 3 is a list"),
    ],
)  # fmt: skip
def test_bad_record_is_an_error_that_names_its_line(tmp_path: Path, bad: object, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record(0)) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(PairsError, match=message):
        Pairs.load(path)


def test_broken_json_missing_file_and_empty_file_are_pairs_errors(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(PairsError, match=r"Cannot read .*: No such file"):
        Pairs.load(path)
    path.write_text('{"prompt": \n')
    with pytest.raises(PairsError, match="Line 1 is not JSON"):
        Pairs.load(path)
    path.write_text("\n")
    with pytest.raises(PairsError, match="no pairs"):
        Pairs.load(path)
    listed = tmp_path / "pairs.json"
    listed.write_text('{"prompt": "q"}')
    with pytest.raises(PairsError, match="holds an object"):
        Pairs.load(listed)


def test_duplicates_are_dropped_on_request_and_contradictions_with_them() -> None:
    swapped = {"prompt": "question 1", "chosen": "bad 1", "rejected": "good 1"}
    records = [record(0), record(1), record(0, id="later"), swapped, record(2)]
    kept = Pairs.from_records(records, duplicates="drop")
    assert [pair.chosen for pair in kept] == ["good 0", "good 2"]
    assert kept[0].meta == {}
    assert len(Pairs.from_records(records, duplicates="keep")) == 5
    assert Pairs.from_records(records, duplicates="keep").deduplicate() == kept
    with pytest.raises(OptionError, match="duplicates must be"):
        Pairs.from_records(records, duplicates="maybe")  # type: ignore[arg-type]


def test_split_never_puts_a_prompt_on_both_sides_and_loses_no_pair() -> None:
    pairs = many(40, per_prompt=4)
    train, validation = pairs.split(0.3, seed=1)
    sides = [{pair.prompt for pair in side} for side in (train, validation)]
    assert not sides[0] & sides[1]
    assert (len(sides[0]), len(sides[1])) == (7, 3)
    assert len(train) + len(validation) == 40
    assert pairs.split(0.3, seed=2).validation != validation


def test_split_counts_prompts_that_differ_in_the_system_line_as_one() -> None:
    pairs = Pairs(
        Pair((Message("system", system), Message("user", f"q{i}")), "a", "b")
        for i in range(10)
        for system in ("x", "y")
    )
    train, validation = pairs.split(0.5)
    assert not {p.prompt[-1] for p in train} & {p.prompt[-1] for p in validation}


def test_split_does_not_depend_on_the_order_of_the_pairs() -> None:
    pairs = many(20)
    backwards = Pairs(reversed(pairs))
    assert {p.chosen for p in pairs.split().train} == {p.chosen for p in backwards.split().train}


def test_split_needs_two_prompts_and_a_share_between_zero_and_one() -> None:
    with pytest.raises(PairsError, match="at least 2 different prompts"):
        many(4, per_prompt=4).split()
    for share in (0.0, 1.0, -1):
        with pytest.raises(OptionError, match="between 0 and 1"):
            many(4).split(share)
    half: Any = "half"
    with pytest.raises(OptionError, match="validation share must be a number; got 'half'"):
        many(4).split(half)
    seed: Any
    for seed in ("a", -5, 1.5, None):
        for draw in (many(4).split, many(4).flip_balanced, lambda seed: many(4).take(2, seed=seed)):
            with pytest.raises(OptionError, match="seed is a whole number"):
                draw(seed=seed)
    share: Any = "0.5"  # a number as text, as a file may have it
    assert many(4).split(share) == many(4).split(0.5)
    train, validation = many(2).split(0.01)
    assert (len(train), len(validation)) == (1, 1)


@pytest.mark.parametrize(("n", "flips"), [(10, 5), (11, 5), (1, 0)])
def test_balanced_flips_swap_exactly_half_of_the_pairs(n: int, flips: int) -> None:
    pairs = many(n)
    flipped = pairs.flip_balanced(seed=3)
    swapped = [a for a, b in zip(pairs, flipped, strict=True) if (a.chosen, a.rejected) == (b.rejected, b.chosen)]
    same = [a for a, b in zip(pairs, flipped, strict=True) if a == b]
    assert (len(swapped), len(same)) == (flips, n - flips)
    if n > 9:
        assert pairs.flip_balanced(seed=4) != flipped


def test_swapped_pairs_swap_what_is_told_of_their_answers() -> None:
    told = {"better": "chosen", "safer": "rejected", "chosen_safe": False, "rejected_safe": True}
    pairs = Pairs([Pair((Message("user", "Why?"),), "because", "no", told)])
    (pair,) = pairs.swapped()
    assert (pair.chosen, pair.rejected) == ("no", "because")
    assert pair.meta == {
        "better": "rejected",
        "safer": "chosen",
        "rejected_safe": False,
        "chosen_safe": True,
    }
    assert pairs.swapped().swapped() == pairs


def test_take_draws_without_replacement_in_order() -> None:
    pairs = many(10)
    drawn = pairs.take(4, seed=1)
    numbers = [int(pair.chosen.split()[1]) for pair in drawn]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 4
    assert pairs.take(4, seed=1) == drawn
    assert pairs.take(4, seed=2) != drawn
    with pytest.raises(OptionError, match="Cannot take 11 pairs out of 10"):
        pairs.take(11)
    for n in ("2", None, 1.5, True):
        with pytest.raises(OptionError, match=r"Cannot take .* pairs out of 10: take a whole number"):
            pairs.take(n)  # pyright: ignore[reportArgumentType]


def test_hash_changes_with_the_text_and_not_with_meta() -> None:
    base = Pairs.from_records([record(0), record(1)])
    assert base.hash() == Pairs.from_records([record(0, id=1), record(1)]).hash()
    assert len(base.hash()) == 64
    others = [
        Pairs.from_records([record(1), record(0)]),
        Pairs.from_records([record(0)]),
        Pairs.from_records([record(0), record(1)]).flip_balanced(),
        Pairs([Pair((Message("user", "ab"),), "c", "d")]),
        Pairs([Pair((Message("user", "a"),), "bc", "d")]),
    ]
    assert len({base.hash(), *(other.hash() for other in others)}) == 6


def test_slices_and_sums_of_pairs_are_pairs() -> None:
    pairs = many(5)
    assert isinstance(pairs[:2], Pairs)
    assert pairs[:2] + pairs[2:] == pairs
    assert pairs[-1] is list(pairs)[4]
    assert repr(pairs) == "Pairs(5 pairs, 5 prompts)"


def test_pairs_built_by_hand_are_checked_too() -> None:
    with pytest.raises(PairsError, match="Pair 1: chosen and rejected are the same"):
        Pairs([Pair((Message("user", "q"),), "a", "a")])


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "chosen": "b", "rejected": "c"}\r\n')
    assert Pairs.load(file)[0].chosen == "b"
