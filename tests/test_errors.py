"""The exception tree and its messages."""

from __future__ import annotations

import inspect
import pickle
import warnings

import pytest

from trimtab import errors
from trimtab.errors import TrimtabError, TrimtabWarning, UnknownName, unknown_name

pytestmark = pytest.mark.quick

TREE = {
    "PairsError": ValueError,
    "RenderError": ValueError,
    "AdapterError": ValueError,
    "CacheError": ValueError,
    "KnobError": ValueError,
    "OptionError": ValueError,
    "UnknownName": KeyError,
    "TuneError": RuntimeError,
    "TrainError": RuntimeError,
    "SandboxError": RuntimeError,
    "JudgeError": RuntimeError,
    "HubError": RuntimeError,
    "EngineError": RuntimeError,
    "MissingDependency": ImportError,
}


def public_errors() -> list[str]:
    return [name for name, value in inspect.getmembers(errors, inspect.isclass) if TrimtabError in value.__mro__[1:]]


@pytest.mark.parametrize(("name", "standard"), TREE.items(), ids=list(TREE))
def test_each_error_can_be_caught_as_ours_and_as_the_standard_type(name: str, standard: type[Exception]) -> None:
    error = getattr(errors, name)
    with pytest.raises(TrimtabError):
        raise error("what, got, would work")
    with pytest.raises(standard, match="what, got, would work"):
        raise error("what, got, would work")


def test_the_tree_drawn_at_the_top_lists_every_error_once() -> None:
    drawn = [line.split()[1] for line in (errors.__doc__ or "").splitlines() if line.startswith(("├──", "└──"))]
    assert sorted(drawn) == sorted(public_errors()) == sorted(TREE)


def test_the_tree_drawn_at_the_top_names_the_standard_types() -> None:
    for name, standard in TREE.items():
        line = next(line for line in (errors.__doc__ or "").splitlines() if f" {name} " in line)
        assert f"({standard.__name__})" in line


def test_a_warning_is_ours_and_a_user_warning() -> None:
    with pytest.warns(UserWarning, match="may not mean"):
        warnings.warn("the result may not mean what it seems to", TrimtabWarning, stacklevel=1)
    assert not issubclass(TrimtabWarning, TrimtabError)  # catching our errors must not catch it


def test_an_unknown_name_lists_the_known_ones_sorted_and_the_nearest() -> None:
    error = unknown_name("method", "diffmeans", ["palrs", "diffmean", "pca", "cold-kernel"])
    assert str(error) == (
        "Unknown method 'diffmeans'. Known: cold-kernel, diffmean, palrs, pca. Did you mean 'diffmean'?"
    )


def test_an_unknown_name_far_from_all_gets_no_suggestion() -> None:
    assert str(unknown_name("method", "zzz", ["palrs", "pca"])) == "Unknown method 'zzz'. Known: palrs, pca."


def test_an_unknown_name_says_when_nothing_is_known() -> None:
    assert str(unknown_name("knob", "math", [])) == "Unknown knob 'math'. Known: none."


def test_known_names_may_be_any_iterable() -> None:
    assert str(unknown_name("knob", "math", iter(("pca",)))) == "Unknown knob 'math'. Known: pca."


def test_an_unknown_name_prints_its_message_and_not_its_repr() -> None:
    message = 'Unknown knob "it\'s". Known: none.'
    assert str(UnknownName(message)) == message
    assert str(KeyError(message)) != message  # what the override is for
    assert str(UnknownName()) == ""


def test_an_unknown_name_survives_pickling() -> None:
    error = unknown_name("knob", "maths", ["math"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
