"""Low-rank weight knobs, row by row: every row of a batch goes through linear layers with a mixture of its own.

The ranks of all knobs lie side by side, so that a layer costs one addition, `y += ((x A^T) * s) B^T`, whatever the
number of knobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.artifact.delta import DeltaKnob
from trimtab.artifact.parts import LowRank
from trimtab.errors import AdapterError, KnobError

Alphas = Mapping[DeltaKnob, float]


@dataclass
class RowAddend:
    """What is added to one linear layer's output."""

    name: str
    a: Tensor  # [R, in], of all knobs side by side, in the layer's dtype and on its device
    b: Tensor  # [out, R]
    strengths: Tensor  # [R] for all rows alike, or [rows, R]

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the output `[B, T, out]` with each row's share added; B is a multiple of the rows.

        Where all rows are alike inputs may have any shape, as those of an expert, which sees some tokens of each row.
        """
        strengths = self.strengths
        if strengths.dim() == 2:
            times, left = divmod(inputs.shape[0], len(strengths))
            if inputs.dim() != 3 or left:
                raise AdapterError(
                    f"{self.name!r} gets its tokens in shape {list(inputs.shape)}, so that their rows are not known: "
                    "knobs on it cannot differ from row to row. Give all rows one setting."
                )
            strengths = strengths.repeat_interleave(times, 0)[:, None]  # [B, 1, R]
        return self.add(inputs, output, strengths)

    def add(self, inputs: Tensor, output: Tensor, strengths: Tensor) -> Tensor:
        """Return the output with every token's share added; `strengths [..., R]` fit the inputs `[..., in]`."""
        return output + ((inputs.to(self.a) @ self.a.T) * strengths @ self.b.T).to(output)


def row_addends(model: nn.Module, rows: Sequence[Alphas]) -> dict[str, RowAddend]:
    """Return what to add to each module, by name; `rows` holds alphas, one mapping for all rows or one per row.

    Raises `KnobError` for a weight that is not that of a linear layer.
    """
    knobs = list(dict.fromkeys(knob for row in rows for knob, alpha in row.items() if alpha))
    names = dict.fromkeys(name for knob in knobs for name in knob.parts)
    found: dict[str, RowAddend] = {}
    for name in names:
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, kind, None)
        if not is_linear(model, name) or not isinstance(weight, Tensor):
            what = (
                "a layer that is never called"
                if _is_lent(model, path)
                else f"a {type(module).__name__}, no linear layer"
            )
            raise KnobError(
                f"{name!r} belongs to {what}, so that rows cannot differ in it. Use the knob in its dense form, "
                "knob.dense_copy(), for all rows alike."
            )
        own = [knob for knob in knobs if name in knob.parts]
        parts: list[LowRank] = []
        for knob in own:
            part = knob.parts[name]
            assert isinstance(part, LowRank)
            parts.append(part if isinstance(module, nn.Linear) else LowRank(part.b.T, part.a.T))
        scales = [
            [row.get(knob, 0.0) for knob, part in zip(own, parts, strict=True) for _ in range(part.rank)]
            for row in rows
        ]
        strengths = torch.tensor(scales, dtype=torch.float64).to(weight)
        if not bool(torch.isfinite(strengths).all()):
            raise KnobError(f"A strength is too large for {weight.dtype}.")
        a = torch.cat([part.a.float() for part in parts]).to(weight)
        b = torch.cat([part.b.float() for part in parts], dim=1).to(weight)
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise KnobError(f"The difference of {name!r} holds values that are not finite in {weight.dtype}.")
        found[path] = RowAddend(name, a, b, strengths[0] if len(rows) == 1 else strengths)
    return found


def is_linear(model: nn.Module, name: str) -> bool:
    """Tell whether a parameter is the matrix of a linear layer, as is that of GPT-2's Conv1D, stored as [in, out].

    Layers whose weight is read without calling them have no output to add to, and do not count.
    """
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and kind == "weight" and not _is_lent(model, path)


def _is_lent(model: nn.Module, path: str) -> bool:
    """Tell whether a layer is the `dt_proj` of a mixer such as Mamba's, known by `A_log`, which reads its weight."""
    owner, _, leaf = path.rpartition(".")
    return leaf == "dt_proj" and hasattr(model.get_submodule(owner), "A_log")


def embedding_scale(module: nn.Module) -> float | None:
    """Return by what an embedding multiplies its rows; None for what is no plain table of rows.

    Some classes scale what they look up, as Gemma's does; what they are is found by asking for a row.
    """
    if not isinstance(module, nn.Embedding):
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    number = 1 if module.padding_idx == 0 and module.num_embeddings > 1 else 0
    row = module.weight[number].detach().float()
    try:
        with torch.no_grad():
            shown = module(torch.tensor([[number]], device=module.weight.device))
    except (TypeError, AttributeError, IndexError):  # one that wants masks, as OPT's positions do
        return None
    if not isinstance(shown, Tensor) or shown.numel() != row.numel() or not bool(row.any()):
        return None
    scale = float(shown.float().flatten() @ row / (row @ row))
    near = torch.allclose(shown.float().flatten(), scale * row, rtol=0.02, atol=1e-6 * abs(scale))
    return scale if near else None
