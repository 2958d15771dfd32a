"""The weights and settings of a Llama stored as GGUF, as mlx-lm's ``llama`` model has them.

MLX reads GGUF's Q4_1 blocks as its own 4-bit affine format with groups of 32, so nothing is quantized anew: names are
mapped, and the rows of q and k are put back in the order that the rotary embedding of ``transformers`` and mlx-lm
expects (llama.cpp stores the two halves of a head interleaved).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

__all__ = ["Metadata", "model_config", "model_weights", "read_gguf", "write_weights"]

Metadata = dict[str, Any]

_GROUP_SIZE, _BITS = 32, 4
_TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def read_gguf(path: Path) -> tuple[dict[str, mx.array], Metadata]:
    """Tensors and metadata of a GGUF file of a quantized Llama; scalars of the metadata as Python numbers."""
    loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    tensors, raw = loaded
    metadata = {k: v.item() if isinstance(v, mx.array) and v.ndim == 0 else v for k, v in raw.items()}
    if metadata.get("general.architecture") != "llama":
        raise ValueError(f"{path.name} holds a model of type {metadata.get('general.architecture')!r}, not 'llama'")
    return tensors, metadata


def model_config(tensors: dict[str, mx.array], metadata: Metadata) -> dict[str, Any]:
    """The ``config.json`` of the model."""
    heads = metadata["llama.attention.head_count"]
    quantization = {"group_size": _GROUP_SIZE, "bits": _BITS, "mode": "affine"}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF stores it as float32: 1e-5 reads 9.999999747378752e-06.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "quantization": quantization,
        "quantization_config": quantization,
    }


def model_weights(tensors: dict[str, mx.array], metadata: Metadata, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The tensors under mlx-lm's names; scales, biases and norms in ``dtype``."""
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if block:
            layer, kind = block.groups()
            target = f"model.layers.{layer}.{_IN_BLOCK[kind]}"
            if kind in heads:
                tensor = _undo_rotary_interleave(tensor, heads[kind])
        else:
            target = _TOP_LEVEL[module]
        weights[f"{target}.{part}"] = tensor if tensor.dtype == mx.uint32 else tensor.astype(dtype)
    return weights


def write_weights(directory: Path, weights: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json``."""
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _undo_rotary_interleave(rows: mx.array, heads: int) -> mx.array:
    """Rows of each head from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...); packed columns are untouched."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
