"""GGUF's tensors under mlx-lm's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.demo.gguf_weights import model_config, model_weights, read_gguf

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
WIDTH = HEADS * HEAD_DIM
METADATA: dict[str, Any] = {
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": 48,
    "llama.block_count": 1,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": 10,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def test_rotary_order_is_that_of_mlx_lm() -> None:
    """Interleaved rotation before conversion and rotation by halves after it give the same scores."""
    mx.random.seed(0)
    tensors = {
        "blk.0.attn_q.weight": mx.random.normal((HEADS * HEAD_DIM, WIDTH)),
        "blk.0.attn_k.weight": mx.random.normal((KV_HEADS * HEAD_DIM, WIDTH)),
    }
    converted = model_weights(tensors, METADATA, mx.float32)
    x = mx.random.normal((1, 5, WIDTH))

    def scores(q_weight: mx.array, k_weight: mx.array, *, traditional: bool) -> mx.array:
        def heads(weight: mx.array) -> mx.array:
            rows = (x @ weight.T).reshape(1, 5, -1, HEAD_DIM).swapaxes(1, 2)
            return mx.fast.rope(rows, HEAD_DIM, traditional=traditional, base=10000.0, scale=1.0, offset=0)

        return heads(q_weight) @ mx.repeat(heads(k_weight), HEADS // KV_HEADS, axis=1).swapaxes(-1, -2)

    wanted = scores(tensors["blk.0.attn_q.weight"], tensors["blk.0.attn_k.weight"], traditional=True)
    found = scores(
        converted["model.layers.0.self_attn.q_proj.weight"],
        converted["model.layers.0.self_attn.k_proj.weight"],
        traditional=False,
    )
    assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4).item()


def test_packed_codes_move_with_their_scales() -> None:
    weight = mx.random.normal((KV_HEADS * HEAD_DIM, 64))
    codes, scales, biases = mx.quantize(weight, group_size=32, bits=4)
    tensors = {"blk.0.attn_k.weight": codes, "blk.0.attn_k.scales": scales, "blk.0.attn_k.biases": biases}
    packed = model_weights(tensors, METADATA, mx.float32)
    plain = model_weights({"blk.0.attn_k.weight": mx.dequantize(codes, scales, biases, 32, 4)}, METADATA, mx.float32)
    name = "model.layers.0.self_attn.k_proj"
    found = mx.dequantize(packed[f"{name}.weight"], packed[f"{name}.scales"], packed[f"{name}.biases"], 32, 4)
    assert mx.array_equal(found, plain[f"{name}.weight"]).item()
    assert packed[f"{name}.weight"].dtype == mx.uint32


def test_names_and_dtypes() -> None:
    tensors = {
        "token_embd.scales": mx.ones((10, 1), mx.float16),
        "output_norm.weight": mx.ones((WIDTH,)),
        "blk.0.ffn_norm.weight": mx.ones((WIDTH,)),
        "blk.0.ffn_down.weight": mx.zeros((WIDTH, 6), mx.uint32),
    }
    weights = model_weights(tensors, METADATA, mx.bfloat16)
    assert {name: x.dtype for name, x in weights.items()} == {
        "model.embed_tokens.scales": mx.bfloat16,
        "model.norm.weight": mx.bfloat16,
        "model.layers.0.post_attention_layernorm.weight": mx.bfloat16,
        "model.layers.0.mlp.down_proj.weight": mx.uint32,
    }


def test_config() -> None:
    config = model_config({}, METADATA)
    assert config["rms_norm_eps"] == 1e-5
    assert config["head_dim"] == HEAD_DIM
    assert config["tie_word_embeddings"]
    assert not model_config({"output.weight": mx.zeros(1)}, METADATA)["tie_word_embeddings"]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    mx.save_gguf(str(path), {"x": mx.zeros(32)}, {"general.architecture": "gemma"})
    with pytest.raises(ValueError, match="'gemma', not 'llama'"):
        read_gguf(path)
