"""Pairs x model to evidence: what the residual stream holds, and what a loss on the pairs asks of it or of the weights.

`capture` reads activations, `capture_gradients` gradients at the residual stream, `weight_gradients` those of weights.
"""

from trimtab.capture.activations import Evidence, capture, evaluating
from trimtab.capture.gradients import (
    GRADIENT_POSITIONS,
    GradientEvidence,
    capture_gradients,
    residual_norms,
    trainable,
    weight_gradients,
)

__all__ = [
    "GRADIENT_POSITIONS",
    "Evidence",
    "GradientEvidence",
    "capture",
    "capture_gradients",
    "evaluating",
    "residual_norms",
    "trainable",
    "weight_gradients",
]
