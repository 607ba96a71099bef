"""Knobs in other homes: exported where that is exact, imported from other tools' files, pushed to a hub and pulled."""

from trimtab.exchange.exporters import EXPORTS, Exported, export
from trimtab.exchange.hub import pull, push
from trimtab.exchange.importers import SOURCES, import_knob

__all__ = ["EXPORTS", "SOURCES", "Exported", "export", "import_knob", "pull", "push"]
