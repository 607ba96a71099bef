"""What a weight knob and a lookahead knob share: parts of weights, the file that holds them, the model they fit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn

from trimtab.artifact.checks import check_gain, check_knob_name, safe_range_of
from trimtab.artifact.file import number, object_field, text_field
from trimtab.artifact.identity import compare_identity
from trimtab.artifact.large import LargeFile, entries_of, write_large
from trimtab.artifact.parts import Part, check_fit, check_part, digest_of, labelled, parts_of
from trimtab.errors import KnobError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARED = frozenset("format_version sha256 kind name method gain provenance diagnostics tuning".split())
"""What the header of every such file holds."""


class PartsKnob:
    """The common base of frozen dataclasses that hold parts of weights by the parameters' names."""

    KIND: ClassVar[str]
    OWN: ClassVar[frozenset[str]] = frozenset()
    """What the header of a file holds beside `SHARED`."""

    name: str
    method: str
    parts: Mapping[str, Part]
    gain: float
    provenance: Mapping[str, Any]
    diagnostics: Mapping[str, Any]
    tuning: Mapping[str, Any] | None

    def _settle(self, what: str) -> None:
        """Put the parts in order; raises `KnobError` for a name, a gain, a part or a tuning that no knob can have."""
        check_knob_name(self.name)
        if not self.parts:
            raise KnobError(f"Knob {self.name!r} holds no {what}: nothing would change at any strength.")
        check_gain(self.gain)
        object.__setattr__(self, "parts", dict(sorted(self.parts.items())))
        for name, part in self.parts.items():
            check_part(name, part)
        _ = self.safe_range

    @property
    def safe_range(self) -> tuple[float, float] | None:
        """Strengths that tuning found safe, lowest and highest; None before tuning."""
        return safe_range_of(self.tuning)

    @cached_property
    def digest(self) -> str:
        """The sha256 of names, shapes and some values of every part, which tells the knob's content from another's."""
        return digest_of(self.parts)

    # File and model

    def header(self) -> dict[str, Any]:
        """Return what a file holds beside the tensors."""
        return {
            "kind": self.KIND,
            "name": self.name,
            "method": self.method,
            "gain": self.gain,
            "provenance": dict(self.provenance),
            "diagnostics": dict(self.diagnostics),
            "tuning": None if self.tuning is None else dict(self.tuning),
        }

    def save(self, path: str | Path) -> None:
        """Write the knob to one safetensors file, tensor by tensor, atomically; see `Knob.save`."""
        write_large(path, entries_of(labelled(self.parts)), self.header())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a knob file, which runs no code; tensors stay in the file until they are used.

        Raises `KnobError` that names what is wrong with a damaged or foreign file.
        """
        try:
            file = LargeFile(path)
            _check_header(file.header, cls.KIND, SHARED | cls.OWN)
            parts = parts_of(file, cls.KIND)
            try:
                return cls(**_shared_fields(file.header, parts), **cls._own_fields(file.header))
            except KnobError as error:
                raise KnobError(f"its content is wrong: {error}") from None
        except KnobError as error:
            raise KnobError(f"Cannot load a knob from {brief(str(path), 240)}: {error}") from None

    @classmethod
    def _own_fields(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `OWN`, from a header that may hold anything under them."""
        return {}

    def check(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        strict: bool = True,
        hashes: bool = True,
    ) -> None:
        """Compare the knob with a model, and with its tokenizer if given; see `Knob.check` and `check_shapes`."""
        self.check_shapes(model)
        compare_identity(self.name, self.provenance, model, tokenizer, strict=strict, hashes=hashes)

    def check_shapes(self, model: nn.Module, *, loaded: bool = True) -> None:
        """Raise `KnobError` for a parameter that the model has not, has in another shape, quantised or elsewhere.

        `loaded=False` compares with a model without weights, on torch's device "meta".
        """
        check_fit(self.name, self.parts, model, loaded=loaded)


def _check_header(header: Mapping[str, Any], kind: str, fields: frozenset[str]) -> None:
    """Raise `KnobError` for the header of another kind, and for a field that is missing or unknown."""
    got = text_field(header, "kind")
    if got != kind:
        raise KnobError(f"it is a knob of kind {brief(got)}; this reads {kind!r}.")
    missing, unknown = sorted(fields - header.keys()), sorted(header.keys() - fields)
    if missing or unknown:
        wrong = f"lacks {brief(missing[0])}" if missing else f"has an unknown field {brief(unknown[0])}"
        raise KnobError(f"its header is wrong: it {wrong}.")


def _shared_fields(header: Mapping[str, Any], parts: Mapping[str, Part]) -> dict[str, Any]:
    return {
        "name": text_field(header, "name"),
        "method": text_field(header, "method"),
        "parts": parts,
        "gain": number(header["gain"], "gain"),
        "provenance": object_field(header, "provenance"),
        "diagnostics": object_field(header, "diagnostics"),
        "tuning": None if header["tuning"] is None else object_field(header, "tuning"),
    }
