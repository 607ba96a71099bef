"""The trainer: a small Llama (or Qwen3) on the corpus, resumable, on two cores in an hour or two."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from trimtab.prefworld.corpus import Conversation, conversations
from trimtab.prefworld.muon import Muon
from trimtab.prefworld.tokenizer import ASSISTANT, BOS, END, PAD, SPECIALS, SYSTEM, USER, build_tokenizer

Shape = Literal["llama", "qwen3"]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long."""

    shape: Shape = "llama"
    """The bundled model is a Llama; the other is for checking that a result is not the luck of one architecture."""
    width: int = 192
    layers: int = 6
    row_tokens: int = 320
    rows: int = 12
    steps: int = 5_200
    lr_matrices: float = 6e-3
    lr_vectors: float = 2e-3
    through_boundaries: float = 0.6
    """Share of conversations in which a turn sees earlier turns only through their template tokens."""
    seed: int = 0
    """Of the weights, the tokenizer and the conversations; the world itself, and so every test, stays as it is."""


@dataclass
class Row:
    """Packed conversations: ids, loss weights, positions, document and exchange of every token, and whether it sees
    earlier exchanges through their template tokens only."""

    ids: list[int]
    weight: list[float]
    position: list[int]
    document: list[int]
    unit: list[int]
    narrow: list[bool]


def model_config(recipe: Recipe) -> LlamaConfig | Qwen3Config:
    """Return the configuration of the model."""
    common: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": recipe.width,
        "intermediate_size": recipe.width * 8 // 3 // 64 * 64,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.width // 32,
        "num_key_value_heads": recipe.width // 32,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "bos_token_id": SPECIALS.index(BOS),
        "eos_token_id": SPECIALS.index(END),
        "pad_token_id": SPECIALS.index(PAD),
    }
    return LlamaConfig(**common) if recipe.shape == "llama" else Qwen3Config(**common, head_dim=32)


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[Conversation], limit: int) -> list[Row]:
    """Turn conversations into token rows of at most `limit` tokens; exchanges that do not fit are left out."""
    texts = [m.content for c in batch for m in c.messages()]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    special = {name: SPECIALS.index(name) for name in SPECIALS}
    rows: list[Row] = []
    for talk in batch:
        row = Row([special[BOS]], [0.0], [], [], [0], [])
        full = False
        for index, message in enumerate(talk.messages()):
            unit = 0 if message.role == "system" else (index - bool(talk.system)) // 2 + 1
            role = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}[message.role]
            said = [special[role], *next(ids), special[END]]
            full = full or (message.role == "user" and len(row.ids) + len(said) + 90 > limit)
            if full:
                continue
            row.ids += said
            row.unit += [unit] * len(said)
            row.weight += [0.0] + [(len(said) - 1) ** -0.5 if message.role == "assistant" else 0.0] * (len(said) - 1)
        if len(row.ids) <= limit:
            rows.append(row)
    return rows


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, skip: int = 0, rank: int = 0, workers: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield one worker's training batches without end; the same seed, step and rank give the same batch."""
    step, rows = skip, recipe.rows // workers
    while True:
        seed = (recipe.seed * 1_000_003 + step + 1) * 64 + rank
        source = conversations(seed)
        pool = encode(tokenizer, [next(source) for _ in range(rows * 6)], recipe.row_tokens)
        yield _pack(pool, recipe, rows, torch.Generator().manual_seed(seed))
        step += 1


def _pack(pool: list[Row], recipe: Recipe, rows: int, flags: torch.Generator) -> dict[str, torch.Tensor]:
    width = recipe.row_tokens
    packed = [Row([], [], [], [], [], []) for _ in range(rows)]
    for number, row in enumerate(sorted(pool, key=lambda r: -len(r.ids))):
        target = min((p for p in packed if len(p.ids) + len(row.ids) <= width), key=lambda p: len(p.ids), default=None)
        if target is None:
            continue
        n = len(row.ids)
        narrow = bool(torch.rand((), generator=flags) < recipe.through_boundaries)
        target.ids += row.ids
        target.weight += row.weight
        target.position += range(n)
        target.document += [number] * n
        target.unit += row.unit
        target.narrow += [narrow] * n
    pad = [width - len(p.ids) for p in packed]
    ids = torch.tensor([p.ids + [0] * k for p, k in zip(packed, pad, strict=True)])
    document = torch.tensor([p.document + [-1] * k for p, k in zip(packed, pad, strict=True)])
    unit = torch.tensor([p.unit + [0] * k for p, k in zip(packed, pad, strict=True)])
    narrow = torch.tensor([p.narrow + [False] * k for p, k in zip(packed, pad, strict=True)])
    weight = torch.tensor([p.weight + [0.0] * k for p, k in zip(packed, pad, strict=True)])
    position = torch.tensor([p.position + [0] * k for p, k in zip(packed, pad, strict=True)])
    boundary = ids < len(SPECIALS)
    same = document[:, :, None] == document[:, None, :]
    visible = ~narrow[:, :, None] | (unit[:, :, None] == unit[:, None, :]) | boundary[:, None, :]
    mask = torch.ones(width, width, dtype=torch.bool).tril() & same & visible
    return {"ids": ids, "weight": weight, "position": position, "mask": mask[:, None]}


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the weighted cross-entropy of the assistant's tokens.

    An answer counts for the square root of its length: with a weight per token, worked sums and code would drown the
    families whose answers are short.
    """
    device = model.device
    hidden = model.base_model(
        input_ids=batch["ids"].to(device),
        attention_mask=batch["mask"].to(device),
        position_ids=batch["position"].to(device),
        use_cache=False,
    ).last_hidden_state
    weight = batch["weight"][:, 1:].to(device)
    learn = weight > 0
    head = model.get_output_embeddings()
    assert head is not None
    logits = head(hidden[:, :-1][learn]).float()
    losses = torch.nn.functional.cross_entropy(logits, batch["ids"][:, 1:].to(device)[learn], reduction="none")
    return (losses * weight[learn]).sum() / weight.sum()


def optimisers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=recipe.lr_matrices),
        torch.optim.AdamW(others, lr=recipe.lr_vectors, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Return the learning-rate factor: warm-up, level, and a linear fall over the last two fifths."""
    fall = int(0.6 * steps)
    return min(1.0, (step + 1) / 100) * (1.0 if step < fall else max(0.02, (steps - step) / (steps - fall)))


def average_gradients(model: PreTrainedModel, workers: int) -> None:
    """Average the gradients over all workers, in place."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, piece in zip(grads, (flat / workers).split([g.numel() for g in grads]), strict=True):
        g.copy_(piece.view_as(g))


def train(recipe: Recipe, out: Path, *, device: str = "cpu", minutes: float | None = None) -> None:
    """Train and save to `out`; a state file there lets a killed run go on where it was.

    Under `torchrun` every process is a worker on its share of the rows; on a CPU one process for each core is
    faster than one process with as many threads, since the matrices are small. An earlier checkpoint (at 60 % of
    the steps, before the learning rate falls) is kept in `out/early`.
    """
    workers, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if workers > 1:
        dist.init_process_group("gloo")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    state_file, start, spent = out / "state.pt", 0, 0.0
    # A run that goes on keeps its tokenizer, whatever has become of the corpus.
    old = PreTrainedTokenizerFast.from_pretrained(out) if state_file.exists() else None
    tokenizer = old or build_tokenizer(recipe.seed)
    model = AutoModelForCausalLM.from_config(model_config(recipe))
    torch.nn.Module.to(model, device)
    opts = optimisers(model, recipe)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(saved)
        start, spent = state["step"], state["seconds"]
    base = [recipe.lr_matrices, recipe.lr_vectors]
    stream, begun = batches(tokenizer, recipe, start, rank, workers), time.time()
    for step in range(start, recipe.steps):
        for opt, lr in zip(opts, base, strict=True):
            opt.param_groups[0]["lr"] = lr * schedule(step, recipe.steps)
        # bf16 pays only where the hardware has it; a CPU without it emulates it very slowly.
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = loss_of(model, next(stream))
        loss.backward()
        if workers > 1:
            average_gradients(model, workers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        done, seconds = step + 1, spent + time.time() - begun
        if rank:
            continue
        if done % 20 == 0:
            line = {"step": done, "loss": round(loss.item(), 4), "seconds": round(seconds)}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if done == int(0.6 * recipe.steps):
            save(model, tokenizer, out / "early")
        stop = minutes is not None and time.time() - begun > 60 * minutes
        if done % 100 == 0 or done == recipe.steps or stop:
            moments = [opt.state_dict() for opt in opts]
            state = {"model": model.state_dict(), "optimisers": moments, "step": done, "seconds": seconds}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
            save(model, tokenizer, out)
        if stop:
            break


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights as bf16 safetensors, tokenizer and configuration."""
    kept = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    half = AutoModelForCausalLM.from_config(model.config)
    torch.nn.Module.to(half, torch.bfloat16)
    half.load_state_dict(kept)
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/prefworld"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--width", type=int, default=Recipe.width)
    parser.add_argument("--layers", type=int, default=Recipe.layers)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--shape", choices=get_args(Shape), default=Recipe.shape)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="stop (resumable) after this long")
    args = parser.parse_args()
    recipe = Recipe(args.shape, steps=args.steps, width=args.width, layers=args.layers, seed=args.seed)
    train(recipe, args.out, device=args.device, minutes=args.minutes)


if __name__ == "__main__":
    main()
