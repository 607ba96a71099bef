"""Knobs in other homes: exported where that is exact, and imported from the files of other tools."""

from trimtab.exchange.exporters import EXPORTS, Exported, export
from trimtab.exchange.importers import SOURCES, import_knob

__all__ = ["EXPORTS", "SOURCES", "Exported", "export", "import_knob"]
