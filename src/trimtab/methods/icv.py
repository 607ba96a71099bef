"""In-context vectors (ICV): the first principal component of the pairs' differences over all layers together.

Paper: S. Liu et al., "In-context Vectors: Making In Context Learning More Effective and Controllable Through Latent
Space Steering", arXiv:2311.06668, section 3.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.methods.pca import component


def icv(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the joint first principal component per site, `[S, D]` float64, from `[N, S, D]` activations.

    The sites' differences are laid end to end, `[N, S D]`, and have one component about zero, whose slices are the
    vectors: layers where pairs differ far get the larger share, and all have one sign, that of the mean difference. Its
    length is the mean difference's component along it. The paper adds the slices at all layers at once and restores
    each token's norm; a knob adds one of them, at the site that is chosen.
    """
    n, sites, width = chosen.shape
    differences = (chosen.double() - rejected.double()).reshape(n, sites * width)
    return component(differences, center=False).reshape(sites, width)
