"""Weight knobs: differences of weights, made, combined, compressed, and turned on a live model."""

from trimtab.weights.delta import difference
from trimtab.weights.lowrank import compress
from trimtab.weights.merge import MERGES

__all__ = ["MERGES", "compress", "difference"]
