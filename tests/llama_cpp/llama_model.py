"""A Llama or Qwen2 of transformers as a GGUF file, and its answers from llama.cpp: what the tests need, no converter.

Token ids go in and logits come out, so that the file needs no tokenizer. llama.cpp's own converters know real models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

import llama_cpp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTEXT = 256


def write_model(path: Path, model: PreTrainedModel) -> None:
    """Write a Llama or Qwen2 in float32, with whatever biases it has."""
    config: Any = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    state = model.state_dict()
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            for kind in ("weight", "bias"):
                tensor = state.get(f"model.layers.{layer}.{theirs}.{kind}")
                if tensor is not None:
                    count = {"attn_q": heads, "attn_k": kv_heads}.get(ours) if config.model_type == "llama" else None
                    tensors[f"blk.{layer}.{ours}.{kind}"] = tensor if count is None else _permuted(tensor, count)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of a projection as llama.cpp has those of a Llama: halves interleaved within a head."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


class Runner:
    """A model in llama.cpp, on one thread, with a cache of keys and values in float32."""

    def __init__(self, model: Any, context: Any, vocabulary: int, width: int, layers: int) -> None:
        self.model, self.context = model, context
        self.vocabulary, self.width, self.layers = vocabulary, width, layers

    def steer(self, vectors: Mapping[int, np.ndarray[Any, Any]]) -> None:
        """Set the control vector as llama.cpp's own loader does: the row of layer L is L - 1; none clears it."""
        rows = np.zeros((self.layers - 1, self.width), dtype=np.float32)
        for layer, vector in vectors.items():
            assert layer >= 1, "llama.cpp's loader refuses direction.0"
            rows[layer - 1] = vector
        data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) if vectors else None
        code = llama_cpp.llama_set_adapter_cvec(self.context, data, rows.size, self.width, 1, self.layers)
        assert code == 0

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits `[T, vocabulary]` of one text."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                batch.logits[i] = True
            assert llama_cpp.llama_decode(self.context, batch) == 0
            rows = [
                np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), (self.vocabulary,)).copy()
                for i in range(len(ids))
            ]
        finally:
            llama_cpp.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def greedy(self, ids: Sequence[int], new: int) -> tuple[list[int], list[float]]:
        """Return the likeliest continuation with the log-probability of each token; every step reads the whole text."""
        text, scores = list(ids), list[float]()
        for _ in range(new):
            last = self.logits(text)[-1].log_softmax(-1)
            text.append(int(last.argmax()))
            scores.append(float(last[text[-1]]))
        return text[len(ids) :], scores


@contextmanager
def opened(path: Path) -> Iterator[Runner]:
    """Open a GGUF file in llama.cpp."""
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp does not load {path}"
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # float32: the default, float16, adds 1e-2 to any comparison
    settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context, f"llama.cpp makes no context for {path}"
    try:
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        layers, width = llama_cpp.llama_model_n_layer(model), llama_cpp.llama_model_n_embd(model)
        yield Runner(model, context, vocabulary, width, layers)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


@llama_cpp.llama_log_callback
def _SILENT(level: int, text: bytes, data: Any) -> None:  # noqa: N802  # must live as long as llama.cpp does
    pass


def read_vector(path: Path) -> dict[int, np.ndarray[Any, Any]]:
    """Read a control vector as llama.cpp's loader does, by the package that goes with it."""
    reader = gguf.GGUFReader(path)
    return {int(tensor.name.removeprefix("direction.")): np.array(tensor.data) for tensor in reader.tensors}
