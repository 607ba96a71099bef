"""What can be asked for by name: the model, its panels, and knobs; and the setting that a request comes to."""

from __future__ import annotations

import time
from collections.abc import Mapping

from trimtab.engines.admission import Admitted, read_setting
from trimtab.engines.continuous.engine import Engine
from trimtab.errors import OptionError, UnknownName, unknown_name
from trimtab.serve.errors import refused
from trimtab.serve.refusal import Refusal
from trimtab.serve.replies import ModelEntry
from trimtab.serve.schemas import Common
from trimtab.types import Setting


class Catalogue:
    """The names of one server; a panel's model is called MODEL:PANEL."""

    def __init__(self, engine: Engine, model: str, panels: Mapping[str, Setting]) -> None:
        self.engine, self.model, self.panels = engine, model, panels
        self._created = int(time.time())

    @property
    def names(self) -> dict[str, str | None]:
        """The models' names, each with its panel."""
        return {self.model: None, **{f"{self.model}:{panel}": panel for panel in self.panels}}

    def panel_of(self, model: str) -> str | None:
        """Return the panel that a model's name stands for; raises `Refusal` for a name that is not known."""
        names = self.names
        if model not in names:
            raise Refusal(404, str(unknown_name("model", model, names)), param="model", code="model_not_found")
        return names[model]

    def entry(self, model: str) -> ModelEntry:
        """Return a model's entry; raises `Refusal` for a name that is not known."""
        return ModelEntry(
            id=model,
            panel=self.panel_of(model),
            object="model",
            created=self._created,
            owned_by="trimtab",
            max_model_len=self.engine.context_length,
        )

    def admit(self, body: Common) -> Admitted | None:
        """Return what a request's model, panel and knobs come to together; raises `Refusal`."""
        panel = self.panel_of(body.model)
        if None not in (panel, body.panel) and panel != body.panel:
            raise Refusal(
                400,
                f"Model {body.model!r} stands for panel {panel!r}, and the request asks for {body.panel!r}. "
                f"Name one of them, or the model {self.model!r}.",
                param="panel",
            )
        setting = dict(self._panel(panel or body.panel))
        try:
            setting |= {} if body.knobs is None else read_setting(body.knobs)
            return self.engine.admission.admit(setting)
        except (OptionError, UnknownName) as error:
            raise refused(error, "knobs") from None

    def _panel(self, name: str | None) -> Setting:
        if name is None:
            return {}
        if name not in self.panels:
            raise Refusal(400, str(unknown_name("panel", name, self.panels)), param="panel")
        missing = sorted(self.panels[name].keys() - self.engine.admission.knobs.keys())
        if missing:
            raise Refusal(
                400,
                f"Panel {name!r} turns {', '.join(map(repr, missing))}, which this server has not loaded. Load it, or "
                "take another panel.",
                param="panel",
            )
        return self.panels[name]
