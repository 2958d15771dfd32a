"""The tokenizer stored in a GGUF file, as the files that ``transformers`` reads.

Only the byte-level BPE of the SmolLM models (``tokenizer.ggml.pre == "smollm"``): GPT-2's, with digits one by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsdpa_patch.demo.gguf_weights import Metadata

__all__ = ["tokenizer_config", "tokenizer_definition", "write_tokenizer"]

_CONTROL = 3
"""The type of special tokens in ``tokenizer.ggml.token_type``."""


def tokenizer_definition(metadata: Metadata) -> dict[str, Any]:
    """The ``tokenizer.json``."""
    model, pre = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if (model, pre) != ("gpt2", "smollm"):
        raise ValueError(f"the tokenizer is of type {model!r} with pre-tokenizer {pre!r}; expected 'gpt2', 'smollm'")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(id, content) for id, content in _special_tokens(metadata)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """The ``tokenizer_config.json``, with the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_tokenizer(directory: Path, metadata: Metadata) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    files = {"tokenizer.json": tokenizer_definition(metadata), "tokenizer_config.json": tokenizer_config(metadata)}
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def _special_tokens(metadata: Metadata) -> list[tuple[int, str]]:
    types = metadata["tokenizer.ggml.token_type"].tolist()
    return [(id, token) for id, token in enumerate(metadata["tokenizer.ggml.tokens"]) if types[id] == _CONTROL]


def _special_token(id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **flags, "special": True}
