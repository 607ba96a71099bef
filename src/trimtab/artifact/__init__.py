"""The knob file: directions with their norms, gain and provenance in one safetensors file; racks and panels."""

from trimtab.artifact.file import FORMAT_VERSION
from trimtab.artifact.identity import model_identity
from trimtab.artifact.knob import Knob, Operation
from trimtab.artifact.rack import Panel, Rack, load_panel, save_panel

__all__ = ["FORMAT_VERSION", "Knob", "Operation", "Panel", "Rack", "load_panel", "model_identity", "save_panel"]
