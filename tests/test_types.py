"""Small values: sites, settings, strengths."""

from __future__ import annotations

import dataclasses

import pytest

from trimtab.errors import OptionError
from trimtab.types import WHERE, Message, Pair, Site, check_several, check_strength, format_setting, parse_setting

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "position", ["post_instruction[-1]", "response_end[-2]", "demonstrated", "last", "response_mean"]
)
def test_a_site_is_read_back_from_its_text(position: str) -> None:
    site = Site(12, position)
    assert str(site) == f"12/{position}"
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize("text", ["", "4", "4/", "/last", "-1/last", "x/last", "4.0/last", "4 /last"])
def test_a_malformed_site_is_an_error_that_shows_the_form(text: str) -> None:
    with pytest.raises(OptionError, match=r"layer/position, e\.g\. 4/last") as caught:
        Site.parse(text)
    assert repr(text) in str(caught.value)


def test_sites_order_by_layer_number_and_then_by_position() -> None:
    sites = [Site(10, "last"), Site(2, "last"), Site(2, "demonstrated")]
    assert sorted(sites) == [Site(2, "demonstrated"), Site(2, "last"), Site(10, "last")]


def test_sites_are_keys() -> None:
    assert {Site(1, "last"): "a"}[Site.parse("1/last")] == "a"


@pytest.mark.parametrize("value", [Message("user", "hi"), Pair((), "a", "b"), Site(0, "last")])
def test_values_are_frozen(value: object) -> None:
    field = dataclasses.fields(value)[0].name  # pyright: ignore[reportArgumentType]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, "other")


def test_pairs_do_not_share_their_meta() -> None:
    first, second = Pair((), "a", "b"), Pair((), "a", "b")
    assert first.meta == {}
    assert first.meta is not second.meta


def test_where_lists_the_choices() -> None:
    assert WHERE == ("all", "prompt", "context", "completion", "thinking", "answer")


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("", {}),
        (" , ", {}),
        ("math=0.8", {"math": 0.8}),
        ("math=0.8,concise=-1", {"math": 0.8, "concise": -1.0}),
        (" math = 0.8 , concise = -1e-2 ,", {"math": 0.8, "concise": -0.01}),
    ],
)
def test_a_setting_is_read_from_text(text: str, setting: dict[str, float]) -> None:
    assert parse_setting(text) == setting


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("math", "got 'math'"),
        ("=1", "got '=1'"),
        ("math=", "strength of 'math' must be a number; got ''"),
        ("math=high", "strength of 'math' must be a number; got 'high'"),
        ("math=nan", "strength of 'math' must be finite; got 'nan'"),
        ("math=1,math=2", "'math' is set twice"),
        ("a=1=2", "strength of 'a' must be a number; got '1=2'"),
    ],
)
def test_a_bad_setting_is_an_error_that_says_what_it_got(text: str, complaint: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_setting(text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("setting", [{}, {"math": 0.8}, {"math": 0.8, "concise": -1.0}, {"a": 1e-7, "b": 3.0}])
def test_a_setting_survives_its_text_form(setting: dict[str, float]) -> None:
    assert parse_setting(format_setting(setting)) == setting


def test_whole_strengths_are_written_without_a_point() -> None:
    assert format_setting({"math": 0.8, "concise": -1.0}) == "math=0.8,concise=-1"


@pytest.mark.parametrize("value", [0, -1, 0.5])
def test_a_finite_strength_becomes_a_float(value: float) -> None:
    strength = check_strength(value)
    assert type(strength) is float
    assert strength == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_strength_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(OptionError, match="must be finite"):
        check_strength(value)


def test_a_strength_that_is_no_number_is_an_error_with_its_name() -> None:
    with pytest.raises(OptionError, match="gain must be a number; got None"):
        check_strength(None, "gain")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="strength must be a number; got True"):
        check_strength(True)


@pytest.mark.parametrize("values", [0.01, "0.1", None, ["0.01"], [True]])
def test_one_number_where_several_are_asked_for_is_an_error_that_shows_the_list(values: object) -> None:
    with pytest.raises(OptionError, match=r"learning_rates are several numbers, as in \[0\.1, 0\.2\]"):
        check_several(values, "learning_rates")
    assert check_several((0.1, 2), "gains") == [0.1, 2]
