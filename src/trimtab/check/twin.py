"""A random twin of an architecture: the same code paths in some thousand parameters, built from its configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from trimtab.errors import AdapterError, OptionError, UnknownName, brief, unknown_name
from trimtab.render import has_model_class, model_class
from trimtab.seeds import seeded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LAYERS, WIDTH, VOCABULARY, CONTEXT, HEADS = 3, 32, 262, 256, 4

_BY_VALUE: dict[int, str] = {
    WIDTH: (
        "hidden_size d_model n_embd word_embed_proj_dim lru_width embedding_size embedding_dim "
        "attention_hidden_size dim"
    ),
    48: (
        "intermediate_size ffn_dim n_inner moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp "
        "shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size ffn_hidden_size"
    ),
    HEADS: (
        "num_attention_heads n_head n_heads num_heads num_local_experts num_experts n_routed_experts moe_num_experts "
        "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads state_size ssm_state_size mamba_d_state "
        "chunk_size mamba_chunk_size time_step_rank mamba_dt_rank"
    ),
    8: (
        "head_dim linear_head_dim linear_key_head_dim linear_value_head_dim sliding_window attention_window_size "
        "window_size attention_chunk_size v_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim kv_lora_rank "
        "q_lora_rank"
    ),
    16: "mamba_d_head mamba_head_dim image_size qk_head_dim",
    64: "mamba_d_ssm",
    2: "linear_num_key_heads num_experts_per_tok num_experts_per_token moe_k patch_size attn_layer_period",
    1: "topk_group n_group first_k_dense_replace mamba_n_groups n_groups attn_layer_offset",
    CONTEXT: "max_position_embeddings n_positions max_seq_len n_ctx context_length",
}
SMALL = {name: value for value, names in _BY_VALUE.items() for name in names.split()}
"""What a setting becomes, by the names that configurations give it; what a configuration lacks is not added."""

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_TEXT = ("text_config", "llm_config")
_TOWERS = ("vision_config", "audio_config", "encoder_config")
_ROPE = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")
_LEFT_OUT = ("architectures", "torch_dtype", "dtype", "auto_map", "quantization_config")


def default_config(model_type: str) -> PretrainedConfig:
    """Return the default configuration of an architecture that transformers knows, by its `model_type`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UnknownName(
            f"{model_type!r} is no folder, no hub name (they have a slash) and no architecture of transformers.{hint}"
        )
    return CONFIG_MAPPING[model_type]()


def twin(
    config: PretrainedConfig, *, seed: int = 0, vision_layers: int = LAYERS + 2, **changes: Any
) -> PreTrainedModel:
    """Build a small random model of the same architecture, float32, in evaluation mode.

    Kept are the kinds of layers and their order, grouped and multi-query attention, experts, windows, norms and soft
    caps; made small are widths, depth, vocabulary and context. Towers for images and sound get `vision_layers`, more
    than the text part; `changes` go to that. Raises `AdapterError` where the architecture cannot be made small or is no
    causal language model, `UnknownName` for a change of a setting that it has not.
    """
    from transformers import PretrainedConfig

    if not isinstance(config, PretrainedConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"A twin is made of a configuration, such as default_config('llama'); got {brief(config)}.")
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(f"{config.model_type!r} is an encoder-decoder model; Trimtab works on decoder-only models.")
    if not has_model_class(config):
        raise AdapterError(f"transformers has no causal language model of the architecture {config.model_type!r}.")
    text = next((getattr(config, name) for name in _TEXT if hasattr(config, name)), config)
    known: set[str] = {*text.to_dict(), *text.attribute_map}
    for name in sorted(changes.keys() - known):
        raise unknown_name(f"setting of {config.model_type}", name, known)
    changes = {text.attribute_map.get(name, name): value for name, value in changes.items()}
    try:
        small = type(config).from_dict(_shrink(config.to_dict(), changes, LAYERS, vision_layers))
        with seeded(seed, torch.device("cpu")):
            model = cast("PreTrainedModel", model_class(small).from_config(small)).float().eval()
            _fill_biases(model)
    except Exception as error:  # whatever somebody's configuration and model code may raise
        kind = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise AdapterError(
            f"Cannot build a small twin of {config.model_type!r}: {kind}. Check a model of this kind itself."
        ) from error
    return model


def _shrink(
    settings: Mapping[str, Any], changes: Mapping[str, Any], layers: int, tower: int, images: bool = False
) -> dict[str, Any]:
    """Return the settings of a small configuration; `changes` go to its text part, `images`: it has some."""
    images = images or any(isinstance(settings.get(name), Mapping) for name in _TOWERS)
    depth = next((settings[name] for name in _COUNTS if isinstance(settings.get(name), int)), 0)
    heads = next((settings[name] for name in _HEADS if isinstance(settings.get(name), int)), 0)
    kinds = next((settings[name] for name in _KINDS if isinstance(settings.get(name), list)), None)
    kept = _kept_layers(kinds or [""] * depth, layers)
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _LEFT_OUT:
            continue
        if name in _TEXT and isinstance(value, Mapping):
            value = _shrink(cast(Mapping[str, Any], value), changes, layers, tower, images)
        elif name in _TOWERS and isinstance(value, Mapping):
            value = _shrink(cast(Mapping[str, Any], value), {}, tower, tower)
        elif "rope" in name and isinstance(value, Mapping):
            value = _plain_rope(cast(Mapping[str, Any], value), images)
        elif isinstance(value, list) and kept and len(cast(list[Any], value)) in (depth, len(kinds or ())) and value:
            value = [cast(list[Any], value)[i] for i in kept]  # one entry per layer
        elif isinstance(value, Mapping) and name.startswith("per_layer"):
            entries = cast(Mapping[Any, Any], value)
            value = {new: entries[old] for new, old in enumerate(kept) if old in entries}
        elif isinstance(value, int) and not isinstance(value, bool):
            value = _small_number(name, value, heads, layers)
        elif value is None and name in ("head_dim", "num_experts_per_tok"):  # some models cannot do without them
            value = SMALL[name]
        elif value is None and name in _KEY_VALUE_HEADS:
            value = HEADS
        elif value is None and name == "attn_layer_indices":
            value = [layers - 1]
        small[name] = value
    if set(small.get("layer_types") or ()) == {"linear_attention"}:  # hybrids by name, whose caches need attention
        small["layer_types"] = [*small["layer_types"][:-1], "full_attention"]
    if {"expand", "num_heads", "head_dim", "state_size"} <= small.keys():  # Mamba 2 calls its own heads so
        small["head_dim"] = WIDTH * small["expand"] // HEADS
    if "initializer_range" in small:
        small["initializer_range"] = 0.15  # greedy choices far enough apart to be the same in every batch
    # random models should not stop by accident
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    if not any(isinstance(settings.get(name), Mapping) for name in _TEXT):
        small |= changes
    return small


def _small_number(name: str, value: int, heads: int, layers: int) -> int:
    if name in _KEY_VALUE_HEADS:
        return value if value == 1 else HEADS if value == heads else HEADS // 2
    if name in _COUNTS:
        return layers
    if name == "vocab_size":
        return VOCABULARY
    if name.endswith(("token_id", "token_index")):
        return min(value, VOCABULARY - 1)
    if name.startswith("num_experts_per_tok") and value == 1:  # some route to one expert and no other number
        return value
    return SMALL[name] if value and name in SMALL else value


def _kept_layers(kinds: Sequence[object], layers: int) -> list[int]:
    """Return the layers to keep: the first of each kind, then whatever comes first."""
    firsts = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:layers]
    spare = [i for i in range(len(kinds)) if i not in firsts]
    return sorted([*firsts, *spare[: layers - len(firsts)]])


def _plain_rope(rope: Mapping[str, Any], images: bool) -> dict[str, Any]:
    """Keep the base and the share of rotary embeddings, for each kind of layer where there are several."""
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {
            name: _plain_rope(cast(Mapping[str, Any], value), images) if isinstance(value, Mapping) else value
            for name, value in rope.items()
        }
    kept = {name: rope[name] for name in _ROPE if rope.get(name) is not None}
    if images or "mrope_section" in rope:  # time, height and width share half of a head's 8 channels
        kept["mrope_section"] = [2, 1, 1]
    return {"rope_theta": 10000.0, **kept, "rope_type": "default"}


def _fill_biases(model: nn.Module) -> None:
    """Draw the biases, which begin at zero and would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
