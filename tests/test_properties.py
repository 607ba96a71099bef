"""Properties that hold for any pairs, settings and sites: examples are drawn by hypothesis, the same in every run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimtab.errors import OptionError, PairsError, TrimtabError
from trimtab.pairs import Pairs
from trimtab.types import Message, Pair, Site, format_setting, is_knob_name, parse_setting

pytestmark = pytest.mark.quick

# No examples on disk, no clock: a run depends on nothing but the code.
steady = settings(deadline=None, max_examples=60, derandomize=True, database=None)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
filled = texts.filter(lambda text: bool(text.strip()))
names = st.text(min_size=1, max_size=9).filter(is_knob_name)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
metas = st.dictionaries(texts.filter(lambda key: key not in ("prompt", "chosen", "rejected")), json_values, max_size=2)
turns = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), filled), max_size=2)


@st.composite
def pair(draw: st.DrawFn, prompts: st.SearchStrategy[str] = filled) -> Pair:
    chosen = draw(filled)
    rejected = draw(filled.filter(lambda text: text.strip() != chosen.strip()))
    return Pair((*draw(turns), Message("user", draw(prompts))), chosen, rejected, draw(metas))


def some(*, least: int = 1, prompts: st.SearchStrategy[str] = filled) -> st.SearchStrategy[Pairs]:
    return st.lists(pair(prompts), min_size=least, max_size=8).map(Pairs)


few_prompts = some(least=2, prompts=st.sampled_from("abcd"))


# Pairs


@given(some(), st.sampled_from(["jsonl", "json"]))
@steady
def test_pairs_that_are_saved_load_as_the_same_pairs_with_the_same_hash(pairs: Pairs, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"pairs.{suffix}"
        pairs.save(path)
        loaded = Pairs.load(path, duplicates="keep")
    assert loaded == pairs
    assert loaded.hash() == pairs.hash()
    assert loaded.prompt_hashes() == pairs.prompt_hashes()


@given(few_prompts, st.floats(0.01, 0.99), st.integers(0, 9))
@steady
def test_a_split_loses_nothing_and_shares_no_prompt(pairs: Pairs, share: float, seed: int) -> None:
    if len(pairs.prompt_hashes()) < 2:
        with pytest.raises(PairsError, match="at least 2 different prompts"):
            pairs.split(share, seed=seed)
        return
    train, validation = pairs.split(share, seed=seed)
    assert len(train) > 0
    assert len(validation) > 0
    assert not set(train.prompt_hashes()) & set(validation.prompt_hashes())
    for side in (train, validation):  # each in the order of the pairs, with nothing new
        rest = iter(pairs)
        assert all(any(kept is other for other in rest) for kept in side)
    assert len(train) + len(validation) == len(pairs)


@given(some(least=0), st.integers(0, 9))
@steady
def test_balanced_flips_swap_exactly_half_and_flip_back(pairs: Pairs, seed: int) -> None:
    flipped = pairs.flip_balanced(seed=seed)
    swapped = [a.chosen == b.rejected and a.rejected == b.chosen for a, b in zip(pairs, flipped, strict=True)]
    same = [a == b for a, b in zip(pairs, flipped, strict=True)]
    assert (sum(swapped), sum(same)) == (len(pairs) // 2, len(pairs) - len(pairs) // 2)
    assert flipped.flip_balanced(seed=seed) == pairs


@given(st.lists(pair(st.sampled_from("ab")), max_size=4), st.lists(st.booleans(), max_size=6))
@steady
def test_deduplicated_pairs_stay_as_they_are(drawn: list[Pair], flips: list[bool]) -> None:
    # Every pair may come again, equal or swapped.
    again = [
        Pair(p.prompt, p.rejected, p.chosen) if flip else Pair(p.prompt, p.chosen, p.rejected)
        for p, flip in zip(drawn * 2, flips, strict=False)
    ]
    pairs = Pairs([*drawn, *again])
    once = pairs.deduplicate()
    assert once.deduplicate() == once
    assert all(any(kept is p for p in pairs) for kept in once)
    kept = [(p.prompt, frozenset([p.chosen, p.rejected])) for p in once]
    assert len(set(kept)) == len(kept)  # neither a repetition nor a contradiction
    if len(once):
        assert Pairs.from_records(once.to_records(), duplicates="error") == once


@given(json_values)
@example({"prompt": "a", "chosen": [{"role": "assistant", "content": [{"type": "text"}]}], "rejected": {}})
@example({"chosen": [None], "rejected": [{}]})
@settings(steady, max_examples=200)
def test_any_json_is_pairs_or_an_error_of_ours(value: object) -> None:
    for record in (value, {"prompt": value, "chosen": value, "rejected": "x"}, {"chosen": [value], "rejected": value}):
        message = "Record 1"
        try:
            Pairs.from_records([record])  # type: ignore[list-item]
        except PairsError as error:
            message = str(error)
        assert message.startswith("Record 1")
        assert len(message) < 400


@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
@steady
def test_any_bytes_are_pairs_or_an_error_of_ours(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
            path = Path(folder) / f"pairs.{suffix}"
            path.write_bytes(data)
            with pytest.raises(TrimtabError):  # no pairs by chance
                Pairs.load(path)


# Settings


@given(st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=4))
@steady
def test_a_setting_survives_its_text_form_to_six_digits(setting: dict[str, float]) -> None:
    back = parse_setting(format_setting(setting))
    assert list(back) == list(setting)
    assert back == {name: float(f"{strength:g}") for name, strength in setting.items()}
    assert all(back[name] == pytest.approx(strength, rel=1e-5, abs=1e-300) for name, strength in setting.items())


@given(st.text(st.sampled_from("ab=,. -+1e_9\n\tnif٣"), max_size=30) | st.text(max_size=30))
@settings(steady, max_examples=300)
def test_any_text_is_a_setting_or_an_option_error(text: str) -> None:
    try:
        setting = parse_setting(text)
    except OptionError:
        return
    assert all(isinstance(strength, float) and abs(strength) < float("inf") for strength in setting.values())
    assert json.dumps(setting, allow_nan=False)


@given(st.builds(Site, st.integers(0, 10**6), st.text(min_size=1, max_size=20)))
@steady
def test_a_site_is_read_back_from_its_text(site: Site) -> None:
    assert Site.parse(str(site)) == site


@given(st.text(st.sampled_from("09-/[]last٣ \n"), max_size=12) | st.text(max_size=12))
@settings(steady, max_examples=200)
def test_any_text_is_a_site_or_an_option_error(text: str) -> None:
    try:
        site = Site.parse(text)
    except OptionError:
        return
    assert site.layer >= 0
    assert Site.parse(str(site)) == site
