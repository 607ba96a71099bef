"""Models, a tokenizer and knobs so small that every test can have its own: built from configurations, no network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab.artifact import Knob
from trimtab.types import Site, Where

SPECIAL = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, END = 0, 1, 2
VOCABULARY = 256 + len(SPECIAL)
LAYERS, WIDTH = 3, 32

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


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # greedy choices far enough apart to be the same in every batch
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,  # random models should not stop by accident
    "use_cache": True,
}

_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "n_inner": 48},
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "mixtral": {"num_local_experts": LAYERS, "num_experts_per_tok": 2},  # as many experts as layers, to confuse
}

# Names of the common settings that a configuration translates itself, or does not have.
_WITHOUT: dict[str, set[str]] = {
    "gpt2": {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"},
    "gptj": {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"},
    "bloom": {"intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"},
    "opt": {"intermediate_size", "num_key_value_heads"},
    "gpt_neox": {"num_key_value_heads"},
    "falcon": {"intermediate_size", "num_key_value_heads"},
}

ARCHITECTURES = list(_OWN)


def model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of one of `ARCHITECTURES`, in evaluation mode; `changes` go to its configuration."""
    common = {key: value for key, value in _COMMON.items() if key not in _WITHOUT.get(name, set())}
    config = CONFIG_MAPPING[name](**{**common, **_OWN[name], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():  # zeros and ones would hide mistakes
            for parameter_name, parameter in built.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(0, 0.1)
    return built


def vision_language_model(*, vision_layers: int = LAYERS) -> PreTrainedModel:
    """A LLaVA whose vision tower has as many layers as its text part."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(**_COMMON)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1)
    return LlavaForConditionalGeneration(config).eval()


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
    operation: Literal["add", "ablate"] = "add",
) -> Knob:
    """A knob with a random direction; at strength 1 it adds a vector of length `gain * norm`."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1000 * layer + seed))
    site = Site(layer, "last")
    return Knob(
        name=name,
        method="random",
        vectors={site: vector},
        norms={layer: norm},
        site=site,
        gain=gain,
        where=where,
        operation=operation,
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
