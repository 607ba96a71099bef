"""Random models, a tokenizer of one token per character, texts and vectors: the same in both environments."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "layers": 4, "inner": 160, "heads": 4, "groups": 4, "vocabulary": 4096},
    "small": {"width": 512, "layers": 8, "inner": 1408, "heads": 8, "groups": 8, "vocabulary": 4096},
    "wide": {"width": 1024, "layers": 10, "inner": 4096, "heads": 16, "groups": 16, "vocabulary": 4096},
    "1b": {"width": 2048, "layers": 16, "inner": 8192, "heads": 32, "groups": 8, "vocabulary": 128_256},
    "3b": {"width": 3072, "layers": 28, "inner": 8192, "heads": 24, "groups": 8, "vocabulary": 128_256},
    "7b": {"width": 4096, "layers": 32, "inner": 11_008, "heads": 32, "groups": 32, "vocabulary": 32_000},
}
"""`small` has 27 million parameters. The last three are as large as models that are in use."""
PAD, OPENING, CHARACTERS = "<pad>", "<s>", 4000
FIRST = 0x4E00
"""The first of the characters that texts are made of."""
SPREAD = 0.25
"""By how much lengths differ from their mean, at most."""


class Sides(NamedTuple):
    """A prompt and its two answers, as text."""

    prompt: str
    chosen: str
    rejected: str


@lru_cache(maxsize=1)  # one at a time: models are large
def llama(shape: str, device: str = "cpu", dtype: str = "float32", **changes: int) -> LlamaForCausalLM:
    """Make a random Llama; equal arguments make equal weights, whatever the version of transformers."""
    sizes = SHAPES[shape] | changes
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["inner"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["groups"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
    return model


def model_of(options: dict[str, Any]) -> LlamaForCausalLM:
    """Make the model that a case names."""
    changes = {name: options[name] for name in ("vocabulary", "layers") if name in options}
    return llama(options["shape"], options["device"], options["dtype"], **changes)


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each character, without a chat template.

    To it a text is one word, so that its cache of words would hold whole texts, and count as memory of reading them.
    """
    names = [PAD, OPENING, "\n", *(chr(FIRST + i) for i in range(CHARACTERS))]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.add_special_tokens([PAD, OPENING])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, model_input_names=["input_ids", "attention_mask"]
    )
    made.backend_tokenizer.model._resize_cache(0)  # a capacity of 0 given above would not be copied
    return made


def sides(count: int, tokens: int, share: float, seed: int = 0) -> list[Sides]:
    """Draw prompts with two answers each: on average so many tokens a side, the `share` of them the prompt's.

    A prompt has at least one token.
    """
    rng = random.Random(seed)

    def text(mean: float) -> str:
        length = max(1, round(mean * rng.uniform(1 - SPREAD, 1 + SPREAD)))
        return "".join(chr(FIRST + rng.randrange(CHARACTERS)) for _ in range(length))

    prompt, answer = share * tokens, (1 - share) * tokens
    return [Sides(text(prompt), text(answer), text(answer)) for _ in range(count)]


def token_ids(texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts."""
    return [[int(i) for i in tokenizer().encode(text, add_special_tokens=False)] for text in texts]


def prompts(rows: int, tokens: int, device: str = "cpu") -> Tensor:
    """Draw rows of token ids `[rows, tokens]`."""
    ids = torch.randint(3, CHARACTERS, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(device)


def steered_layers(layers: int) -> list[int]:
    """Return the four layers, or fewer, at which a vector is added."""
    return list(range(0, layers, max(1, layers // 4)))[:4]


def vectors(layers: Sequence[int], width: int) -> dict[int, Tensor]:
    """Draw a vector `[D]` for each layer, long enough to change what a random model says."""
    return {layer: 0.2 * torch.randn(width, generator=torch.Generator().manual_seed(layer)) for layer in layers}
