"""How long the step of a lookahead knob is that divides a difference: between rounding and curvature.

A difference of two streams is rounding where they lie too close, and no derivative where they lie too far apart. Steps
are lengths in multiples of the gradient G, the epsilon of COLD-Steer (arXiv:2603.06495), whose 1e-6 is mostly rounding.
"""

from __future__ import annotations

import torch

from trimtab.artifact import LookaheadKnob
from trimtab.errors import KnobError

FLOOR, USUAL, LEAST, MOST = 1e-3, 0.5, 4.0, 0.05
"""The step that is taken moves the stream by `USUAL` times the root of the dtype's resolution, as a share of its norm:
the best of 1/4 to 4 on trained models; and by `FLOOR` at least, which float32 can afford, for the sake of tokens that
move less than others. Steps that move it by less than `LEAST` times the resolution itself are refused, since
differences would be rounding, and so are those that move it by more than `MOST` of its norm: no derivative any more."""


def usual_share(dtype: torch.dtype) -> float:
    """Return the share of the stream's norm by which a scaled step should move it, in a dtype.

    Between rounding, which is the resolution over the share, and curvature, which grows with the share. The resolution
    is float32's at best: models compute norms and softmax in it whatever their weights are.
    """
    return max(FLOOR, USUAL * resolution(dtype) ** 0.5)


def resolution(dtype: torch.dtype) -> float:
    """Return the spacing of numbers near 1 in a dtype, or in float32 where that is wider."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def resolved_step(dtype: torch.dtype, knob: LookaheadKnob) -> float:
    """Return the length of the scaled step in multiples of G; raises `KnobError` where it would drown in rounding,
    and where it is too long for a derivative.
    """
    layers = knob.layers
    share = {layer: knob.scales[layer] / knob.norms[layer] for layer in layers}  # of the norm, at step 1
    weakest = min(layers, key=lambda layer: share[layer])
    usual = usual_share(dtype) / share[knob.top]
    if knob.step is None:
        return usual
    moved, least = knob.step * share[weakest], LEAST * resolution(dtype)
    if moved < least:
        raise KnobError(
            f"A step of {knob.step:g} times the gradient of {knob.name!r} moves the stream at layer {weakest} by "
            f"{moved:.2g} of its norm, which {str(dtype).removeprefix('torch.')} cannot resolve: of differences below "
            f"{least:.2g} most is rounding. A step of {usual:.2g} works; so does backend='exact', which takes none."
        )
    if (farthest := knob.step * max(share.values())) > MOST:
        raise KnobError(
            f"A step of {knob.step:g} times the gradient of {knob.name!r} moves the stream by {farthest:.2g} of its "
            f"norm, too far for a derivative. A step of {usual:.2g} works; so does backend='exact', which takes none."
        )
    return knob.step
