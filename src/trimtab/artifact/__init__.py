"""The knob file: directions, weight differences or gradients, with gain and provenance; racks and panels of knobs."""

from trimtab.artifact.checks import OPERATIONS, Operation
from trimtab.artifact.delta import DeltaKnob
from trimtab.artifact.file import FORMAT_VERSION
from trimtab.artifact.identity import model_identity
from trimtab.artifact.kernel import KernelExamples
from trimtab.artifact.knob import Knob
from trimtab.artifact.lookahead import LookaheadKnob
from trimtab.artifact.parts import LowRank
from trimtab.artifact.rack import AnyKnob, Panel, Rack, load_knob, load_panel, save_panel

__all__ = [
    "FORMAT_VERSION",
    "OPERATIONS",
    "AnyKnob",
    "DeltaKnob",
    "KernelExamples",
    "Knob",
    "LookaheadKnob",
    "LowRank",
    "Operation",
    "Panel",
    "Rack",
    "load_knob",
    "load_panel",
    "model_identity",
    "save_panel",
]
