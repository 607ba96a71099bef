"""What a lookahead knob costs per token, beside the algorithm that was released for it, and what its step does.

Cost (CPU time, as ratios to a plain step of the same round): a second stream up to block s of n is to take 1 + (s+1)/n
plain steps with a scaled step, within a tenth, and 1 + 2 (s+1)/n with the exact derivative, within a quarter. Step: how
much of a difference is rounding, in the released way and in ours, on a toy that was trained on bigrams.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import signature
from re import search
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.adapter import CACHE_NAMES, Adapter, parameters_to
from trimtab.artifact import DeltaKnob, LookaheadKnob, LowRank
from trimtab.artifact.parts import Part, labelled
from trimtab.errors import KnobError
from trimtab.lookahead import Stream
from trimtab.pairs import Pairs
from trimtab.runtime import steer
from trimtab.steplength import usual_share
from trimtab.train.steps import learn_lookahead

Backend = Literal["exact", "scaled"]
Way = Callable[[], AbstractContextManager[object]]

ETA, EPS = 0.01, 1e-6
"""Of the released configuration."""
VOCABULARY, PROMPT, PREFILL, CONTEXT = 4096, 8, 128, 64
ROWS, DEPTHS = (1, 4), (0.5, 0.8)
WITHIN: dict[Backend, float] = {"scaled": 1.1, "exact": 1.25}
"""How many times what the formula says a step may take."""
SPECIAL, LETTERS = ["<pad>", "<end>"], "abcdefghijklmnopqrstuvwxyz"
NEAR = {"float32": 0.999, "bfloat16": 0.9}
"""Least cosine of a scaled step with the exact derivative, where the step is the one that is taken by itself."""
TOY_LAYERS, TOY_STEPS, TOY_PAIRS = 4, 400, 32


# --- what it costs ---------------------------------------------------------------------------------------------------


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """Make a random model; a block has about 17 width^2 weights, and the head as many as a quarter of one."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    return LlamaForCausalLM(config).eval()


def random_part(shape: Sequence[int], rank: int) -> Part:
    """Make a small part: whole for a vector, thin for a matrix."""
    if len(shape) == 1:
        return 0.01 * torch.randn(*shape)
    return LowRank(0.01 * torch.randn(rank, shape[1]), 0.01 * torch.randn(shape[0], rank))


def lookahead(model: LlamaForCausalLM, site: int, rank: int, backend: Backend) -> LookaheadKnob:
    """Make a knob with a random gradient of all that comes before the output of block `site`."""
    adapter = Adapter(model)
    parts = {name: random_part(model.get_parameter(name).shape, rank) for name in parameters_to(adapter, site).names}
    one = {site: 1.0}
    return LookaheadKnob("bench", "cold-fd", parts, one, one, (site,), adapter.path, 1e-3, backend=backend)


def one_step(model: LlamaForCausalLM, rank: int) -> DeltaKnob:
    """Make a random step of every linear layer."""
    linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return DeltaKnob("step", "one-step", {n: random_part(model.get_parameter(n).shape, rank) for n in linear}, 1e-3)


@contextmanager
def released(model: LlamaForCausalLM, other: LlamaForCausalLM, site: int, whole: bool) -> Generator[None]:
    """Steer as the released code does: in the hook of a block, all of a second model runs, without a KV cache.

    It runs on the tokens of the call; with `whole`, on all tokens so far, without which it knows nothing of the past.
    """
    ids: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        new = kwargs["input_ids"]
        past = ids.pop() if whole and ids and new.shape[1] == 1 else new[:, :0]
        ids[:] = [torch.cat([past, new], 1)]

    def move(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        seen: list[Any] = []
        handle = other.model.layers[site].register_forward_hook(lambda _m, _a, out: seen.append(out))
        other(input_ids=ids[0], use_cache=False)
        handle.remove()
        return output - ETA / EPS * (seen[0][:, -output.shape[1] :] - output)

    handles = [
        model.model.register_forward_pre_hook(note, with_kwargs=True),
        model.model.layers[site].register_forward_hook(move),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoding(model: LlamaForCausalLM, rows: int, prompt: int, tokens: int) -> list[float]:
    """Return the CPU seconds of each of some steps of one token, after a prompt."""
    ids = torch.randint(3, VOCABULARY, (rows, prompt + tokens), generator=torch.Generator().manual_seed(0))
    name = next(name for name in CACHE_NAMES if name in signature(model.model.forward).parameters)
    cache: dict[str, Any] = {name: DynamicCache(config=model.config)}
    model(input_ids=ids[:, :prompt], use_cache=True, **cache)
    seconds: list[float] = []
    for column in range(prompt, prompt + tokens):
        begun = time.process_time()
        model(input_ids=ids[:, column : column + 1], use_cache=True, **cache)
        seconds.append(time.process_time() - begun)
    return seconds


def prefilling(model: LlamaForCausalLM, rows: int, prompt: int) -> list[float]:
    """Return the CPU seconds of reading a prompt."""
    ids = torch.randint(3, VOCABULARY, (rows, prompt), generator=torch.Generator().manual_seed(0))
    begun = time.process_time()
    model(input_ids=ids, use_cache=True)
    return [time.process_time() - begun]


def ratios(ways: Mapping[str, Way], work: Callable[[], list[float]], rounds: int) -> dict[str, float]:
    """Return the median over rounds of each way's time over that of the way "plain" of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            with way(), torch.inference_mode():
                spent = statistics.median(work())
            if turn:  # the first round warms up
                seconds[name].append(spent)
    plain = seconds["plain"]
    return {n: statistics.median(a / b for a, b in zip(own, plain, strict=True)) for n, own in seconds.items()}


def judged(ratio: float, site: int, layers: int, backend: Backend) -> dict[str, Any]:
    """Put a ratio beside what it is to be."""
    formula = 1 + (1 if backend == "scaled" else 2) * (site + 1) / layers
    most = WITHIN[backend] * formula
    return {"plain steps": ratio, "formula": formula, "at most": most, "holds": ratio <= most}


def cost(width: int, layers: int, rank: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure time per token and memory of lookahead knobs, of the released algorithm, and of the step itself."""
    torch.manual_seed(0)
    model = llama(width, layers)
    sites = [round(layers * share) - 1 for share in DEPTHS]
    kinds: list[tuple[int, int, Backend]] = [(site, rank, backend) for site in sites for backend in WITHIN]
    kinds.append((sites[0], 4 * rank, "scaled"))
    knobs = {str(kind): lookahead(model, *kind) for kind in kinds}
    steers: dict[str, Way] = {name: partial(steer, model, {knob: 1.0}) for name, knob in knobs.items()}
    plain: Way = partial(steer, model, {})
    ways = {"plain": plain, **steers, "step": partial(steer, model, {one_step(model, rank): 1.0})}
    works: dict[tuple[str, int], Callable[[], list[float]]] = {
        **{("decode", rows): partial(decoding, model, rows, PROMPT, tokens) for rows in ROWS},
        ("prefill", 1): partial(prefilling, model, 1, PREFILL),
    }
    found = {work: ratios(ways, work_of, rounds) for work, work_of in works.items()}
    table = [
        {"stage": stage, "rows": rows, "site": site, "rank": thin, "backend": backend}
        | judged(by_way[str((site, thin, backend))], site, layers, backend)
        for (stage, rows), by_way in found.items()
        for site, thin, backend in kinds
    ]
    step = [{"stage": stage, "rows": rows, "plain steps": by["step"]} for (stage, rows), by in found.items()]
    return {
        "lookahead": table,
        "one step, no second stream": step,
        **beside_released(model, plain, steers, sites[0], rank, rounds),
        "memory": memory(model, sites, rank),
    }


def beside_released(
    model: LlamaForCausalLM, plain: Way, steers: Mapping[str, Way], site: int, rank: int, rounds: int
) -> dict[str, Any]:
    """Measure the released algorithm at one site, and how many times as long as ours it takes for a token."""
    other, few = copy.deepcopy(model), 4
    ways = {
        "plain": plain,
        **{backend: steers[str((site, rank, backend))] for backend in WITHIN},
        "all tokens so far": partial(released, model, other, site, True),
        "one token without its past": partial(released, model, other, site, False),
    }
    found = ratios(ways, partial(decoding, model, 1, CONTEXT, few), rounds)
    whole = found["all tokens so far"]
    return {
        f"released, {CONTEXT} tokens of context, site {site}": {
            "plain steps": found,
            "over ours": {backend: whole / found[backend] for backend in WITHIN},
            "holds": all(whole > found[backend] for backend in WITHIN),
        }
    }


def memory(model: LlamaForCausalLM, sites: Sequence[int], rank: int) -> list[dict[str, Any]]:
    """Count the bytes of knobs, and of the second copy of the weights in the released algorithm."""
    second = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    rows: list[dict[str, Any]] = []
    for site in sites:
        sizes: dict[int, int] = {}
        for thin in (rank, 4 * rank):
            tensors = labelled(lookahead(model, site, thin, "scaled").parts).values()
            sizes[thin] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            shares = {"knob, MB": sizes[thin] / 1e6, "second copy, MB": second / 1e6, "share": sizes[thin] / second}
            rows.append({"site": site, "rank": thin, **shares, "holds": sizes[thin] <= thin / rank * sizes[rank]})
    return rows


# --- what its step does ----------------------------------------------------------------------------------------------


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


def main() -> None:
    """Print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="each measures every way once (default 5)")
    parser.add_argument("--width", type=int, default=1024, help="of the model whose cost is measured (default 1024)")
    parser.add_argument("--layers", type=int, default=10, help="blocks of that model (default 10)")
    parser.add_argument("--tokens", type=int, default=8, help="generated in each round (default 8)")
    parser.add_argument("--rank", type=int, default=16, help="of the gradient; four times it is measured too")
    parser.add_argument("--only", choices=("cost", "eps"), help="one of the two halves")
    args = parser.parse_args()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), **vars(args)}
    if args.only != "eps":
        found |= cost(args.width, args.layers, args.rank, args.tokens, args.rounds)
    if args.only != "cost":
        found |= steps(args.rank)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
