"""The examples of a kernel knob: what each of them asks for, and the state at which it does."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimtab.artifact.file import number, object_field, text_field
from trimtab.errors import KnobError, OptionError, brief
from trimtab.kernels import KERNELS, Kernel, Weigher, check_kernel, kernel_sums, make_weigher
from trimtab.types import Site

FIELDS = ("kind", "scales", "temperature")
"""What a file's header says of the examples: each of them, and nothing else."""
PARTS = ("key/", "value/")
"""What the labels of the examples' tensors begin with."""


@dataclass(frozen=True, eq=False)
class KernelExamples:
    """N examples per site, weighed by how like the stream's state h is to theirs: `sum_j w_j(h) v_j / scale`."""

    kind: Kernel
    """How they are weighed: "cosine", "softmax" or "linear", see `trimtab.kernels.kernel_weights`."""
    temperature: float
    """Of the kernel "softmax"; other ones have none, and say 1."""
    keys: Mapping[Site, Tensor]
    """State `z_j` of each example, `[N, D]` float32 per site."""
    values: Mapping[Site, Tensor]
    """What each example adds, `v_j`, `[N, D]` float32 per site: minus its gradient over N."""
    scales: Mapping[Site, float]
    """Mean length of `sum_j w_j v_j` over the examples' own states; where it is 0, nothing is added."""

    def __post_init__(self) -> None:
        try:
            check_kernel(self.kind, self.temperature)
        except OptionError as error:
            raise KnobError(str(error)) from None
        if self.kind == "unit":
            raise KnobError("The kernel 'unit' weighs no examples: that is a knob with operation 'add'.")
        if not self.keys or not self.keys.keys() == self.values.keys() == self.scales.keys():
            said = (f"{what} of {len(of)}" for what, of in self._by_site().items())
            raise KnobError(f"Each site of a kernel has keys, values and a scale; got {', '.join(said)} sites.")
        for name in ("keys", "values"):
            tensors: Mapping[Site, Tensor] = getattr(self, name)
            kept = {site: t.detach().to("cpu", torch.float32).clone() for site, t in sorted(tensors.items())}
            object.__setattr__(self, name, kept)
        for site in self.keys:
            self._check(site)

    @classmethod
    def weigh(
        cls, kind: Kernel, temperature: float, keys: Mapping[Site, Tensor], values: Mapping[Site, Tensor]
    ) -> KernelExamples:
        """Take examples `[N, D]` per site, and how long their weighted sums are at their own states."""
        scales = {
            site: float(kernel_sums(keys[site], keys[site], values[site], kind, temperature).norm(dim=-1).mean())
            for site in keys
        }
        return cls(kind, temperature if kind == "softmax" else 1.0, keys, values, scales)

    @classmethod
    def from_file(
        cls, header: Mapping[str, Any], keys: Mapping[Site, Tensor], values: Mapping[Site, Tensor]
    ) -> KernelExamples:
        """Read them from their part of a header and the tensors of a file."""
        if sorted(header) != [*FIELDS]:
            raise KnobError(f"Its kernel has the fields {brief(sorted(header))}, not {[*FIELDS]}.")
        kind = text_field(header, "kind")
        if kind not in KERNELS:
            raise KnobError(f"Its kernel is {brief(kind)}; known: {', '.join(KERNELS)}.")
        stored = object_field(header, "scales")
        if stored.keys() != set(map(str, keys)):
            raise KnobError(f"Its kernel has scales of {brief(sorted(stored))} and keys of {brief([*map(str, keys)])}.")
        scales = {site: number(stored[str(site)], "scale") for site in keys}
        return cls(kind, number(header["temperature"], "temperature"), keys, values, scales)

    def header(self) -> dict[str, Any]:
        """Return what a file holds beside the tensors."""
        scales = {str(site): scale for site, scale in sorted(self.scales.items())}
        return {"kind": self.kind, "temperature": self.temperature, "scales": scales}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under their labels in a file."""
        parts = zip(PARTS, (self.keys, self.values), strict=True)
        return {f"{part}{site}": tensor for part, tensors in parts for site, tensor in tensors.items()}

    @property
    def count(self) -> int:
        """The number N of examples."""
        return len(next(iter(self.keys.values())))

    @property
    def width(self) -> int:
        """Hidden width D."""
        return next(iter(self.keys.values())).shape[1]

    def at(self, sites: Collection[Site]) -> KernelExamples:
        """Keep these sites; itself if that is all there are, so that what is prepared is kept."""
        if set(sites) == set(self.keys):
            return self
        parts = {name: {site: of[site] for site in sites} for name, of in self._by_site().items()}
        return replace(self, **parts)

    def reversed(self) -> KernelExamples:
        """Turn around what every example adds."""
        return replace(self, values={site: -values for site, values in self.values.items()})

    def weigher(self, site: Site) -> Weigher:
        """Return what weighs the examples of a site, made once."""
        if site not in self._weighers:
            self._weighers[site] = make_weigher(self.keys[site], self.kind, self.temperature)
        return self._weighers[site]

    def scaled(self, site: Site) -> Tensor:
        """Return the values over the scale, `[N, D]` float32: added up, of length 1 on average over the examples."""
        return (self.values[site].double() / (self.scales[site] or 1.0)).float() * (self.scales[site] > 0)

    def digest(self, site: Site) -> bytes:
        """The sha256 of all that a site's examples do."""
        if site not in self._digests:
            state = hashlib.sha256(f"{self.kind} {self.temperature!r} {self.scales[site]!r}".encode())
            for tensor in (self.keys[site], self.values[site]):
                state.update(tensor.contiguous().numpy().tobytes())
            self._digests[site] = state.digest()
        return self._digests[site]

    def __str__(self) -> str:
        """Say what they are, for the card."""
        warmth = f" at temperature {self.temperature:g}" if self.kind == "softmax" else ""
        return f"kernel {self.kind}{warmth} over {self.count} example{'s' * (self.count != 1)}"

    @cached_property
    def _weighers(self) -> dict[Site, Weigher]:
        return {}

    @cached_property
    def _digests(self) -> dict[Site, bytes]:
        return {}

    def _by_site(self) -> dict[str, Mapping[Site, Any]]:
        return {"keys": self.keys, "values": self.values, "scales": self.scales}

    def _check(self, site: Site) -> None:
        shape = next(iter(self.keys.values())).shape
        for what, tensor in (("keys", self.keys[site]), ("values", self.values[site])):
            if tensor.dim() != 2 or not tensor.numel() or tensor.shape != shape:
                raise KnobError(
                    f"The {what} of a kernel have one shape [N, D] at every site; those of site {site} have "
                    f"{brief(list(tensor.shape))}."
                )
            if not bool(tensor.isfinite().all()):
                raise KnobError(f"The {what} of site {site} hold values that are not finite.")
        scale = self.scales[site]
        sums = float(self.values[site].double().norm(dim=-1).sum())
        if not 0 <= scale <= torch.finfo(torch.float64).max:
            raise KnobError(f"The scale of site {site} is finite and not negative; got {scale!r}.")
        if scale and sums / scale > torch.finfo(torch.float32).max:
            raise KnobError(f"The scale of site {site}, {scale:g}, is too small for values as large as {sums:.4g}.")
