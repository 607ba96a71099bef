"""A random twin of an architecture: the same code paths in a few thousand parameters, built from its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trimtab.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LAYERS, WIDTH, VOCABULARY, CONTEXT, HEADS = 3, 32, 262, 256, 4

_BY_VALUE: dict[int, str] = {
    WIDTH: "hidden_size d_model n_embd word_embed_proj_dim lru_width embedding_size attention_hidden_size dim",
    48: (
        "intermediate_size ffn_dim n_inner moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp "
        "shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size ffn_hidden_size"
    ),
    HEADS: (
        "num_attention_heads n_head n_heads num_heads num_local_experts num_experts n_routed_experts moe_num_experts "
        "linear_num_value_heads mamba_n_heads mamba_num_heads state_size ssm_state_size mamba_d_state chunk_size "
        "mamba_chunk_size kv_lora_rank q_lora_rank time_step_rank mamba_dt_rank"
    ),
    8: (
        "head_dim linear_key_head_dim linear_value_head_dim sliding_window attention_window_size window_size "
        "attention_chunk_size v_head_dim qk_nope_head_dim rotary_dim"
    ),
    16: "mamba_d_head mamba_head_dim image_size",
    2: "linear_num_key_heads num_experts_per_tok qk_rope_head_dim patch_size",
    1: "topk_group n_group first_k_dense_replace mamba_n_groups n_groups",
    CONTEXT: "max_position_embeddings n_positions max_seq_len n_ctx context_length",
}
SMALL = {name: value for value, names in _BY_VALUE.items() for name in names.split()}
"""What a setting becomes, by the names that configurations give it; what a configuration lacks is not added."""

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_PARTS = ("text_config", "vision_config", "audio_config", "llm_config", "decoder_config", "encoder_config")


def twin(config: PretrainedConfig, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a small random model of the same architecture, in evaluation mode and float32.

    Kept are the kinds of layers and their order, grouped and multi-query attention, experts, windows, norms and soft
    caps; made small are widths, depth, vocabulary and context. `changes` go to the text part of the small
    configuration. Raises `AdapterError` where the architecture cannot be made small.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model_type = str(config.model_type)
    try:
        small = type(config).from_dict(_shrink(config.to_dict(), changes, layers=LAYERS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            factory = AutoModelForCausalLM
            if type(small) not in AutoModelForCausalLM._model_mapping:  # pyright: ignore
                factory = AutoModelForImageTextToText
            model: PreTrainedModel = factory.from_config(small).float().eval()
            _randomise(model)
    except (
        ValueError,
        TypeError,
        RuntimeError,
        KeyError,
        AttributeError,
        IndexError,
        ImportError,
        AssertionError,
        NotImplementedError,
        ZeroDivisionError,
    ) as error:
        raise AdapterError(f"Cannot build a small twin of {model_type!r}: {type(error).__name__}: {error}") from error
    return model


def _shrink(settings: dict[str, Any], changes: Mapping[str, Any], *, layers: int) -> dict[str, Any]:
    small = dict(settings)
    old_heads = next(
        (
            settings[n]
            for n in ("num_attention_heads", "n_head", "n_heads", "num_heads")
            if isinstance(settings.get(n), int)
        ),
        None,
    )
    for name, value in settings.items():
        if name in SMALL and isinstance(value, int) and not isinstance(value, bool) and value:
            small[name] = SMALL[name]
        elif name in _COUNTS and isinstance(value, int):
            small[name] = layers
        elif name in _KEY_VALUE_HEADS and isinstance(value, int):
            small[name] = value if value == 1 else HEADS if value == old_heads else 2
        elif name in _KINDS and isinstance(value, list):
            small[name] = _kinds(value, layers)
        elif name == "vocab_size" and isinstance(value, int):
            small[name] = VOCABULARY
        elif "rope" in name and isinstance(value, dict):
            small[name] = _plain_rope(value)
        elif name in _PARTS and isinstance(value, dict):
            inner = changes if name in ("text_config", "llm_config") else {}
            small[name] = _shrink(value, inner, layers=layers if inner is changes else layers + 2)
        elif name.endswith("token_id") and isinstance(value, int):
            small[name] = min(value, 2) if "image" not in name else VOCABULARY - 1
        elif name.endswith("token_id") and isinstance(value, list):
            small[name] = None
    small["eos_token_id"] = None if "eos_token_id" in small else small.get("eos_token_id")
    small["pad_token_id"] = 0
    if "initializer_range" in small:
        small["initializer_range"] = 0.15
    if not any(isinstance(settings.get(p), dict) for p in ("text_config", "llm_config")):
        small.update(changes)
    for n in ("architectures", "torch_dtype", "dtype", "auto_map", "quantization_config"):
        small.pop(n, None)
    return small


def _kinds(kinds: Sequence[str], layers: int) -> list[str]:
    """Keep one layer of each kind, in the order of their first appearance, then fill up from the front."""
    firsts = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    keep = sorted(set(firsts.values()))[:layers]
    spare = [i for i in range(len(kinds)) if i not in keep]
    return [kinds[i] for i in sorted([*keep, *spare[: layers - len(keep)]])]


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _plain_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    kept = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
    return {"rope_type": "default", "rope_theta": 10000.0, **kept}


def _randomise(model: torch.nn.Module) -> None:
    """Fill in biases, which start as zeros and would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
