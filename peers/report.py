"""The tables of the comparison with peers, and the page docs/parity.md that holds them."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parity.md"
LIMIT = 0.999
READING_LIMIT = 1e-4

PAGE_TEXT = """# Parity with peers

Written by `make test-peers`, which installs the peers into an environment of their own (`.venv-peers`, versions in
`peers/constraints.txt`) because they need an older transformers and NumPy than Trimtab.

- Trimtab {trimtab}: torch {torch}, transformers {transformers}.
- repeng {repeng} and steering-vectors {steering}: torch {their_torch}, transformers {their_transformers},
  NumPy {numpy}, scikit-learn {sklearn}.

The smallest cosine over all sites must be above {limit}; digits are cut, not rounded. "pico" is a random Llama of 3
layers with one token per character, "prefworld" the bundled model; beside it stands the family of PrefWorld's pairs,
100 of them. "Length" is the smallest ratio of lengths, the shorter to the longer.

## Which method is which

| Trimtab | peer | centre | sign | length of the peer's |
|---|---|---|---|---|
| `diffmean` | steering-vectors `mean_aggregator` (its default) | - | - | the same |
| `pca` | steering-vectors `pca_aggregator` | zero | the same | 1 |
| `pca` | repeng `pca_center` | zero: it centres each pair, not all differences | the majority's | 1 |
| `pca` with `center` | repeng `pca_diff` (its default) | the mean difference | the majority's | 1 |

The sign of Trimtab and steering-vectors is that of the mean difference along the direction; repeng's is that of most
pairs. They part where a few pairs differ far and the many a little the other way. Before comparing, repeng's vectors
are turned along the mean difference; that changed {turned} of {total}. A Trimtab vector is as long as the mean
difference's component along it.

## The same activations

Trimtab's activations go through the peers' own code: `question_response` at `last` and `response_as_user` at
`post_instruction`, every layer. The last three columns hold what must fail. The peer sees wrong activations: rejected
answers shuffled among the pairs (a mean does not depend on who is paired with whom and stays as it is), or rejected
answers read one layer further up. Or ours takes the other choice of `center`.

{shared}

## From model and texts

The peers load the same weights and tokenizer and read the same texts themselves, at the last token
(`question_response` at `last`). Trimtab and steering-vectors number layers alike: layer `i` is the output of block `i`.
repeng reads `hidden_states[i + 1]`, which is the same except at the last layer, where it comes after the final norm and
is compared with Trimtab's method on activations after that norm. Left to itself repeng leaves out layer 0; here it is
asked for. The last column must fail: Trimtab's vector of the layer before (for layer 0, of the last).

{own}

The activations that Trimtab and steering-vectors read differ by at most {reading:.0e} of their norm (must be below
{reading_limit:.0e}).

## Their files

Random vectors, saved by the peers' own code (CAA's is no package: its file is what `torch.save` makes of a tensor,
added from the prompt's last token on), imported by Trimtab, at multipliers 1 and -0.7 on the random model. A file of
repeng that is exported again is the same bytes.

| file | imported as | where | largest difference of a logit | the vector moves logits by |
|---|---|---|---|---|
{files}

## Again

```sh
make test-peers
```
"""


class Check(NamedTuple):
    """Smallest cosines over the sites of a source: the one that must be high, and those that must be low."""

    peer: str
    method: str
    ours: str
    source: str
    sites: str
    cosine: float
    wrong: dict[str, float]
    also: dict[str, float]
    """What must be high too."""

    @property
    def holds(self) -> bool:
        """True when everything is on its side of the limit; NaN is not."""
        right = (self.cosine, *self.also.values())
        return all(value > LIMIT for value in right) and all(abs(value) < LIMIT for value in self.wrong.values())


def down(value: float) -> str:
    """Write a cosine with six digits, never rounded up to the limit or to 1."""
    return f"{math.floor(value * 1e6) / 1e6:.6f}" if value > LIMIT else f"{value:.3f}"


def table(checks: list[Check], names: tuple[str, ...]) -> str:
    """Lay out checks in Markdown, with a column for each further comparison."""
    shown = {"diffmean": "`diffmean`", "pca": "`pca`", "pca_center": "`pca`, `center`"}
    heads = ["peer", "method", "Trimtab", "model, pairs", "sites", "smallest cosine", *names]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for check in checks:
        others = {**check.wrong, **check.also}
        cells = [check.peer, f"`{check.method}`", shown[check.ours], check.source, check.sites, down(check.cosine)]
        cells += [down(others[name]) if name in others else "-" for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(folder: Path, tables: tuple[str, str], turned: int, total: int, difference: float) -> str:
    """Return the whole page."""
    rows = json.loads((folder / "files.json").read_text(encoding="utf-8"))
    packages = {"repeng": "repeng", "steering": "steering-vectors", "their_torch": "torch", "numpy": "numpy"}
    packages |= {"their_transformers": "transformers", "sklearn": "scikit-learn"}
    return PAGE_TEXT.format(
        **json.loads((folder / "versions.json").read_text(encoding="utf-8")),
        **{name: version(package) for name, package in packages.items()},
        limit=LIMIT,
        turned=turned,
        total=total,
        shared=tables[0],
        own=tables[1],
        reading=difference,
        reading_limit=READING_LIMIT,
        files="\n".join(f"| `{row[0]}` | " + " | ".join(row[1:]) + " |" for row in rows),
    )
