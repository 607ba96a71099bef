"""What an engine was told of knobs: `trimtab` in its `additional_config`, read and completed once, in its front end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, cast

from trimtab.engines.admission import DOSES, DosePolicy
from trimtab.errors import OptionError, brief, unknown_name

KEY = "trimtab"
"""Of the settings in `additional_config`, and of what the front end writes into a request's `extra_args`."""
ATTRIBUTE = "trimtab_settings"
"""Of a `VllmConfig`, which vLLM copies into every process of an engine."""
REQUESTED = "knobs"
"""Of what a request asks for in its `extra_args`."""


@dataclass
class Settings:
    """The options of the plugin, as in `additional_config={"trimtab": {"knobs": {"math": "FILE"}}}`."""

    knobs: dict[str, str] = field(default_factory=dict[str, str])
    """Paths of knob files by the names under which requests turn them."""
    strict: bool = True
    """Whether a knob from another architecture or chat template is refused, and not only warned of."""
    dose: DosePolicy = "free"
    """What becomes of strengths outside a knob's safe range: "strict" refuses, "clamp" moves, "free" takes them."""
    layers: list[int] | None = None
    """Layers that knobs may act on; None for all. Each has a table of addends, and costs an addition."""
    allow_loading: bool = False
    """Whether `POST /v1/knobs` may load knob files of the server's machine."""
    digests: dict[str, str] = field(default_factory=dict[str, str])
    """By name, of the knobs as the front end has read them."""
    version: str = ""
    """Of Trimtab."""

    @staticmethod
    def read(config: object) -> Settings | None:
        """Return the settings in an engine's `additional_config`, or None where there are none.

        Raises `OptionError` for what is no setting, `UnknownName` for one that does not exist.
        """
        found = cast(Mapping[str, object], config).get(KEY) if isinstance(config, Mapping) else None
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise OptionError(
                f'additional_config["{KEY}"] holds settings, as in {{"knobs": {{}}}}; got {brief(found)}.'
            )
        options = cast(Mapping[str, Any], found)
        known = Settings.__dataclass_fields__
        for name in options:
            if name not in known:
                raise unknown_name(f'setting in additional_config["{KEY}"]', name, known)
        settings = Settings(**options)
        _check(settings)
        return settings

    @staticmethod
    def of(config: Any) -> Settings | None:
        """Return the settings that `put_into` has left in a `VllmConfig`, in any process; None where there are none.

        Raises `OptionError` for a configuration that has lost them on its way.
        """
        if KEY not in (config.additional_config or {}):
            return None
        stored: dict[str, Any] | None = getattr(config, ATTRIBUTE, None)
        if stored is None:
            raise OptionError("This engine's configuration has lost its knobs on the way between its processes.")
        return Settings(**stored)

    def put_into(self, config: Any) -> None:
        """Leave the settings in a `VllmConfig`.

        vLLM keeps compiled models by what stands in `additional_config`: which layers have tables, and whose, makes
        another model, and which knobs there are does not.
        """
        self.version = version("trimtab")
        setattr(config, ATTRIBUTE, asdict(self))
        shown = {"version": self.version, "layers": self.layers}
        config.additional_config = {**config.additional_config, KEY: shown}


def _check(settings: Settings) -> None:
    knobs = cast(object, settings.knobs)
    entries = cast(Mapping[object, object], knobs).items() if isinstance(knobs, Mapping) else None
    if entries is None or not all(isinstance(part, str) for entry in entries for part in entry):
        raise OptionError(f'The knobs of an engine are paths by name, as in {{"math": "FILE"}}; got {brief(knobs)}.')
    for name in ("strict", "allow_loading"):
        if not isinstance(getattr(settings, name), bool):
            raise OptionError(f"{name} is true or false; got {brief(getattr(settings, name))}.")
    if settings.dose not in DOSES:
        raise unknown_name("dose policy", str(settings.dose), DOSES)
    layers: object = settings.layers
    numbers = isinstance(layers, list) and layers and all(type(layer) is int and layer >= 0 for layer in layers)
    if layers is not None and not numbers:
        raise OptionError(f"layers is a list of layers, counted from 0; got {brief(layers)}.")


def stamp_of(params: Any) -> dict[str, Any] | None:
    """Return what the front end has written into a request, or None for one without knobs."""
    extra = getattr(params, "extra_args", None)
    return extra.get(KEY) if extra else None
