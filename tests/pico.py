"""Models, a tokenizer and knobs so small that every test can have its own: built from configurations, no network."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trimtab.adapter import CACHE_NAMES
from trimtab.artifact import KernelExamples, Knob, Operation
from trimtab.check import default_config, twin
from trimtab.check.twin import LAYERS, WIDTH
from trimtab.kernels import Kernel
from trimtab.types import Site, Where

SPECIAL = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, END = 0, 1, 2
VOCABULARY = 256 + len(SPECIAL)  # as many as a twin has

TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""After the user slot come four tokens: <|end|>, newline, <|assistant|>, newline."""


def tokenizer(*, chat: bool = True, units: Literal["characters", "bytes"] = "characters") -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters (256 of them, so that any answer can be told from any other).

    With `units="bytes"` it knows every text, and a character may be several tokens. `chat=False`: no chat template.
    """
    core = Tokenizer(models.BPE(vocab={}, merges=[]))
    if units == "bytes":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
    else:
        letters = ["\n", *map(chr, range(0x20, 0x7F)), *map(chr, range(0xA1, 0xA1 + 160))]
        core.decoder = decoders.Fuse()
    core.model = models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *letters])}, merges=[])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        wrapped.chat_template = TEMPLATE
    return wrapped


ARCHITECTURES = """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj opt bloom falcon mpt olmo2 granite
    starcoder2 stablelm cohere smollm3 exaone4 glm4 deepseek_v3
    mixtral qwen3_moe gpt_oss olmoe granitemoe
    mamba falcon_mamba mamba2 jamba falcon_h1 qwen3_next lfm2
""".split()
"""Architectures of text models, by the names transformers gives them: dense, mixtures of experts, state spaces and
hybrids. Models are random twins of their default configurations."""

VISION = ("llava", "gemma3", "smolvlm", "qwen3_vl", "mistral3", "idefics3", "internvl")
"""Architectures with a tower for images, which their twins have deeper than the text part."""

EXPERTS = ("deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe", "jamba", "qwen3_next")
"""Mixtures of experts compute on the tokens sent to them, from all rows: other shapes, other bits."""

PURE_STATES = ("mamba", "falcon_mamba", "mamba2")
"""Architectures of recurrent states alone: these have taken in their padding, and take a mask of new tokens only."""

CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaForCausalLM.forward).parameters)
"""What this version of transformers calls a KV cache, as an argument and in results."""

_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},  # as Llama 3 has it
    "mixtral": {"num_local_experts": LAYERS},  # as many experts as layers, to confuse
}


def model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of one of `ARCHITECTURES`, in evaluation mode; `changes` go to its configuration."""
    return twin(default_config(name), seed=seed, **{**_CHANGES.get(name, {}), **changes}).to(dtype)


def vision_language_model(name: str = "llava", *, vision_layers: int = LAYERS + 2) -> PreTrainedModel:
    """A model with a vision tower deeper than its text part, or as deep as `vision_layers`."""
    return twin(default_config(name), vision_layers=vision_layers)


class _Block(nn.Module):
    def __init__(self, width: int, returns: Literal["tensor", "tuple"]) -> None:
        super().__init__()
        self.mix, self.returns = nn.Linear(width, width), returns

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, str]:
        past = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        hidden = hidden + torch.tanh(self.mix(past))
        return hidden if self.returns == "tensor" else (hidden, "what else a block may return")


class HomeMade(nn.Module):
    """A decoder from outside transformers: blocks in a ModuleDict, as tensors or tuples, no cache, no mask."""

    def __init__(self, returns: Literal["tensor", "tuple"] = "tensor", *, towers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH)
        for tower in range(towers):
            blocks = nn.ModuleList(_Block(WIDTH, returns) for _ in range(LAYERS))
            self.add_module(f"tower{tower}", nn.ModuleDict({"h": blocks}))
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.get_submodule("tower0.h").children():
            out = block(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.head(hidden)


def knob(
    layer: int = 1,
    *,
    name: str = "pico",
    seed: int = 0,
    width: int = WIDTH,
    norm: float = 4.0,
    gain: float = 1.0,
    where: Where = "all",
    operation: Operation = "add",
    kernel: Kernel = "softmax",
    examples: int = 5,
    temperature: float = 1.0,
) -> Knob:
    """A knob with a random direction; at strength 1 it adds a vector of length `gain * norm`.

    With operation "kernel" it holds random examples, which do so on average.
    """
    generator = torch.Generator().manual_seed(1000 * layer + seed)
    vector, site = torch.randn(width, generator=generator), Site(layer, "last")
    keys, values = torch.randn(2, examples, width, generator=generator)
    if operation == "kernel":
        vector = values.sum(0)
    return Knob(
        name=name,
        method="random",
        vectors={site: vector},
        norms={layer: norm},
        site=site,
        gain=gain,
        where=where,
        operation=operation,
        kernel=KernelExamples.weigh(kernel, temperature, {site: keys}, {site: values})
        if operation == "kernel"
        else None,
    )


def prompts(lengths: list[int], *, seed: int = 0) -> list[list[int]]:
    """Random token ids, one list per length, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), VOCABULARY - 1, (n,), generator=generator).tolist() for n in lengths]


def pad(rows: list[list[int]], side: Literal["left", "right"] = "left") -> dict[str, Tensor]:
    """Pad rows of ids; `position_ids` count real tokens, as models with absolute positions need on the left."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
