"""The exception tree: what went wrong, what we got, what would work.

TrimtabError
├── PairsError         (ValueError)    preference pairs that cannot be used
├── RenderError        (ValueError)    chat template or tokenizer
├── AdapterError       (ValueError)    decoder blocks not found, layer out of range
├── KnobError          (ValueError)    knob file damaged, or made for another model
├── CacheError         (ValueError)    a KV cache that was made under other knobs
├── OptionError        (ValueError)    an option's value is out of its range
├── UnknownName        (KeyError)      a name that is not in a list of known names
├── TuneError          (RuntimeError)  no setting of the knob, or of several, keeps the budget
├── TrainError         (RuntimeError)  training came to nothing that could be used
├── SandboxError       (RuntimeError)  the sandbox could not run model-written code
├── JudgeError         (RuntimeError)  the endpoint of a judge refuses, or cannot be reached
├── HubError           (RuntimeError)  a hub of models refuses, cannot be reached, or has no such knob
├── EngineError        (RuntimeError)  an engine that serves requests has stopped, or cannot run this model
└── MissingDependency  (ImportError)   an optional package is not installed

TrimtabWarning         (UserWarning)   the result stands, but may not mean what it seems to
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base of every error that Trimtab raises on purpose.

    Catch it to catch them all. The message says what is wrong, what we got, and what would work.
    """


class PairsError(TrimtabError, ValueError):
    """Preference pairs are missing fields, empty, duplicated or contradictory.

    Mend the record that the message names; its fields are those of TRL's preference format.
    """


class RenderError(TrimtabError, ValueError):
    """The chat template or tokenizer cannot express what was asked.

    Take the tokenizer that belongs to the model, and texts that its template shows.
    """


class AdapterError(TrimtabError, ValueError):
    """The decoder blocks were not found, or a layer does not exist.

    Take a layer that the message lists, or look at the model with `trimtab check MODEL`.
    """


class KnobError(TrimtabError, ValueError):
    """A knob file is damaged, or the knob does not fit this model.

    Get the file again, or learn the knob on this model. `trimtab inspect FILE` says what it was learned on.
    """


class CacheError(TrimtabError, ValueError):
    """A KV cache was made under other knobs, or cannot be followed from call to call.

    Pass the whole prompt with an empty cache, or call with `use_cache=False`.
    """


class OptionError(TrimtabError, ValueError):
    """An option has a value outside its range.

    Pass a value that the message allows.
    """


class UnknownName(TrimtabError, KeyError):
    """A name is not in the list of known names.

    Take one of the names that the message lists.
    """

    def __str__(self) -> str:
        # KeyError would print the repr of the message, quotes and escapes included.
        return str(self.args[0]) if self.args else ""


class TuneError(TrimtabError, RuntimeError):
    """No setting of the knob (site, tokens, gain), or of several knobs (strengths), keeps the budgets.

    Look at the labels of the pairs, loosen the budget or a guardrail, or try smaller doses.
    """


class TrainError(TrimtabError, RuntimeError):
    """Training came to nothing that could be used.

    Take a smaller learning rate, or check the pairs.
    """


class SandboxError(TrimtabError, RuntimeError):
    """The sandbox itself failed; the judged program is not to blame.

    Run it again; if it fails again, the message holds what the sandbox's helper complained of.
    """


class JudgeError(TrimtabError, RuntimeError):
    """The endpoint of a judge refuses, cannot be reached, or does not speak the protocol.

    Check the address, the name of the model and the key, then run the command again.
    """


class HubError(TrimtabError, RuntimeError):
    """A hub of models refuses, cannot be reached, or does not have what was asked for.

    Check the name, the key and the network, then run the command again.
    """


class EngineError(TrimtabError, RuntimeError):
    """An engine that serves requests has stopped, or cannot run this model.

    Start the engine again; its own log says why it stopped. Use transformers for a model that it cannot run.
    """


class MissingDependency(TrimtabError, ImportError):
    """An optional package is not installed.

    Run the install command that the message prints.
    """


class TrimtabWarning(UserWarning):
    """The result stands, but may not mean what it seems to.

    Read it before the figures; `knob.diagnostics["warnings"]` keeps those of learning.
    """


def unknown_name(what: str, got: object, known: Iterable[str]) -> UnknownName:
    """Build the error for a name that is not known, with the nearest match.

    >>> print(unknown_name("method", "diffmeans", ["palrs", "diffmean"]))
    Unknown method 'diffmeans'. Known: diffmean, palrs. Did you mean 'diffmean'?
    """
    names = sorted(known)
    message = f"Unknown {what} {got!r}. Known: {', '.join(names) or 'none'}."
    near = difflib.get_close_matches(str(got), names, n=1)
    return UnknownName(message + (f" Did you mean {near[0]!r}?" if near else ""))


def brief(value: object, limit: int = 60) -> str:
    """Write a value that came from a file as it may stand in a message: on one line, printable, and not endless.

    >>> brief("x" * 1000, 20)
    "'xxxxxxx...xxxxxxxx'"
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 1, limit, limit, limit
    try:
        return short.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a very long {type(value).__name__}"


def printable(text: str) -> str:
    """Replace what is not printable: no command to the terminal, and no line that poses as another.

    >>> printable("a\\nb")
    'a\N{REPLACEMENT CHARACTER}b'
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
