"""What the step of a lookahead knob does: how much of a difference is rounding, in the released way and in ours.

    python -m benchmarks.lookahead_steps

On a toy that is trained on bigrams here; docs/gradients.md has the table. Also the bytes of knobs, and of the released
algorithm's second copy of the weights. What a step takes in time is a case of `make bench`.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from re import search
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.models import llama
from benchmarks.ours.lookahead import RANK, knob_of
from trimtab.adapter import Adapter
from trimtab.artifact import LookaheadKnob
from trimtab.artifact.parts import Part, labelled
from trimtab.errors import KnobError
from trimtab.lookahead import Stream
from trimtab.pairs import Pairs
from trimtab.steplength import usual_share
from trimtab.train.steps import learn_lookahead

SPECIAL, LETTERS = ["<pad>", "<end>"], "abcdefghijklmnopqrstuvwxyz"
NEAR = {"float32": 0.999, "bfloat16": 0.9}
"""Least cosine of a scaled step with the exact derivative, where the step is the one that is taken by itself."""
TOY_LAYERS, TOY_STEPS, TOY_PAIRS = 4, 400, 32


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of letters, with a template that adds none."""
    names = [*SPECIAL, *LETTERS]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[1])
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def walks(table: Tensor, first: Tensor, length: int) -> Tensor:
    """Draw letters after the `first` ones `[N]`, each by the row of the one before: `[N, length]`."""
    columns = [first]
    for _ in range(length):
        columns.append(torch.multinomial(table[columns[-1]], 1)[:, 0])
    return torch.stack(columns[1:], 1)


def toy() -> tuple[LlamaForCausalLM, Pairs, Tensor]:
    """Train a small model on bigrams; return it, pairs that prefer other bigrams, and token ids `[N, T]` of its own."""
    count, special = len(LETTERS), len(SPECIAL)
    own, other = (2 * torch.randn(2, count, count)).softmax(-1)
    config = LlamaConfig(
        vocab_size=count + special,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=TOY_LAYERS,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(TOY_STEPS):
        ids = walks(own, torch.randint(count, (16,)), 32) + special
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    prompts = walks(own, torch.randint(count, (TOY_PAIRS,)), 12)
    texts = [prompts, walks(other, prompts[:, -1], 8), walks(own, prompts[:, -1], 8)]
    spelt = [["".join(LETTERS[i] for i in row) for row in text.tolist()] for text in texts]
    pairs = Pairs.from_records({"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(*spelt, strict=True))
    return model.eval(), pairs, walks(own, torch.randint(count, (8,)), 16) + special


def displacement(model: LlamaForCausalLM, knob: LookaheadKnob, ids: Tensor) -> Tensor:
    """Return the derivative of the stream at the knob's layer along its gradient, `[N, T, D]`."""
    adapter, layer = Adapter(model), knob.top
    stream = Stream(adapter, knob, apart=True)
    with torch.no_grad(), stream.ready(), adapter.write({}, before=stream.begin):
        adapter.run_to(0, input_ids=ids)
    return stream.displacement(layer, torch.empty(0)) * (-knob.scales[layer] / knob.norms[layer])


def difference(
    model: LlamaForCausalLM, gradient: Mapping[str, Part], site: int, eps: float, ids: Tensor
) -> tuple[Tensor, float]:
    """Return what the released code takes for that derivative, and the share of weights that its step changes."""
    other = copy.deepcopy(model)
    changed = total = 0
    with torch.no_grad():
        for name, part in gradient.items():
            assert isinstance(part, Tensor)
            weight = other.get_parameter(name)
            weight.add_((eps * part).to(weight.dtype))
            changed += int((weight != model.get_parameter(name)).sum())
            total += weight.numel()
        seen: list[Tensor] = []
        for one in (other, model):
            with Adapter(one).read([site]) as reading:
                one(input_ids=ids, use_cache=False)
            seen.append(reading.acts[site])
    return ((seen[0] - seen[1]) / eps).float(), changed / total


def near(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Compare with the exact derivative."""
    cosine = float(cosine_similarity(found.double().flatten(), wanted.double().flatten(), 0))
    return {"cosine": cosine, "norm": float(found.norm() / wanted.norm())}


def ours(model: LlamaForCausalLM, knob: LookaheadKnob, eps: float, ids: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Compare our scaled step with the exact derivative; or return the step that is named where this one is refused."""
    try:
        return near(displacement(model, knob.with_(backend="scaled", step=eps), ids), wanted)
    except KnobError as error:
        named = search(r"A step of (\S+) works", str(error))
        assert named
        return {"refused, and named instead": float(named[1])}


def steps(rank: int) -> dict[str, Any]:
    """Measure what is left of the derivative in a difference, by dtype, loss and length of the step."""
    torch.manual_seed(0)
    model, pairs, ids = toy()
    tokenizer, site = letters_tokenizer(), TOY_LAYERS // 2
    rows: list[dict[str, Any]] = []
    exact_rows: list[dict[str, Any]] = []
    kept: dict[str, float] = {}
    for loss in ("sft", "dpo:per=token"):
        whole, thin = (learn_lookahead(model, tokenizer, pairs, loss=loss, layers=[site], rank=r) for r in (None, rank))
        exact, exact_thin = (displacement(model, knob, ids) for knob in (whole, thin))
        kept[loss] = near(exact_thin, exact)["cosine"]
        for dtype in (torch.float32, torch.bfloat16):
            held: Any = copy.deepcopy(model)
            held.to(dtype)
            exact_rows.append(
                {"loss": loss, "weights": str(dtype)[6:], **near(displacement(held, thin, ids), exact_thin)}
            )
            usual = usual_share(dtype) * thin.norms[site] / thin.scales[site]
            for eps in (*(10.0**power for power in range(-6, 1)), usual):
                theirs, changed = difference(held, whole.parts, site, eps, ids)
                row: dict[str, Any] = {
                    "loss": loss,
                    "weights": str(dtype)[6:],
                    "eps": eps,
                    "our own choice": eps == usual,
                }
                row["released"] = {"weights that change": changed, **near(theirs, exact)}
                rows.append(row | {"ours": ours(held, thin, eps, ids, exact_thin)})
    own = {
        name: [row["ours"]["cosine"] for row in rows if row["weights"] == name and row["our own choice"]]
        for name in NEAR
    }
    small = [row for row in rows if row["weights"] == "bfloat16" and row["eps"] == 1e-6]
    return {
        "cosine of the exact derivative with that of the whole gradient": {"rank": rank, **kept},
        "exact derivative, with that in float32": exact_rows,
        "steps": rows,
        "our own choice": {
            name: {"cosine": min(own[name]), "at least": least, "holds": min(own[name]) >= least}
            for name, least in NEAR.items()
        },
        "1e-6 in bfloat16": {"holds": all("refused, and named instead" in row["ours"] for row in small)},
    }


def memory() -> list[dict[str, Any]]:
    """Count the bytes of knobs, and of the second copy of the weights in the released algorithm."""
    model = llama("wide")
    second = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    rows: list[dict[str, Any]] = []
    for site in (4, 7):
        for rank in (RANK, 4 * RANK):
            tensors = labelled(knob_of(model, site, rank, "scaled").parts).values()
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            rows.append({"layer": site, "rank": rank, "knob, MB": size / 1e6, "second copy, MB": second / 1e6})
    return rows


def main() -> None:
    """Print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rank", type=int, default=RANK, help="of the gradient of the toy (default 16)")
    found = {"threads": torch.get_num_threads(), **steps(parser.parse_args().rank), "memory": memory()}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
