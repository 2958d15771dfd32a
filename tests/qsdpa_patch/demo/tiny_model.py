"""A random Llama of a few thousand weights with a byte-level tokenizer, as a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from qsdpa_patch.demo.gguf_tokenizer import write_tokenizer
from qsdpa_patch.demo.gguf_weights import write_weights

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 2
WIDTH, HIDDEN = HEADS * HEAD_DIM, 128
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def byte_tokens() -> list[str]:
    """The printable stand-ins of GPT-2's byte-level alphabet, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in stand_ins)
    stand_ins |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_ins[byte] for byte in sorted(stand_ins)]


def tokenizer_metadata() -> dict[str, Any]:
    """What GGUF says of a tokenizer: three special tokens, the bytes, and two merges."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *byte_tokens(), "he", "hel", "12"]
    types = mx.array([3] * len(special) + [1] * (len(tokens) - len(special)))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["h e", "he l", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        "llama.context_length": 512,
    }


def write_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Write the model; its weights are drawn from ``seed``."""
    metadata = tokenizer_metadata()
    vocabulary = len(metadata["tokenizer.ggml.tokens"])
    mx.random.seed(seed)
    matrices = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (HIDDEN, WIDTH),
        "mlp.up_proj": (HIDDEN, WIDTH),
        "mlp.down_proj": (WIDTH, HIDDEN),
    }
    weights = {
        "model.embed_tokens.weight": 0.1 * mx.random.normal((vocabulary, WIDTH)),
        "model.norm.weight": mx.ones(WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in matrices.items():
            weights[f"{prefix}.{name}.weight"] = mx.random.normal(shape) * shape[1] ** -0.5
        weights[f"{prefix}.input_layernorm.weight"] = mx.ones(WIDTH)
        weights[f"{prefix}.post_attention_layernorm.weight"] = mx.ones(WIDTH)
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, weights, config)
    write_tokenizer(directory, metadata)
    return directory
