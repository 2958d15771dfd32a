"""The tokenizer of a GGUF file, read back by the libraries that mlx-lm uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, load

from qsdpa_patch.demo.gguf_tokenizer import tokenizer_definition, write_tokenizer
from tests.qsdpa_patch.demo.tiny_model import tokenizer_metadata


@pytest.fixture(name="tokenizer", scope="module")
def fixture_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, tokenizer_metadata())
    return load(directory)


def test_merges_and_digits(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("hello 12"))
    assert tokens == ["hel", "l", "o", "Ġ", "1", "2"]  # "12" is a merge, but digits are split first


@pytest.mark.parametrize("text", ["It's 3 o'clock,\n\n  café 日本語 \t!", "<|im_start|>user\nhi<|im_end|>"])
def test_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_single(tokenizer: Any) -> None:
    assert tokenizer.encode("<|im_start|><|im_end|>") == [1, 2]
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.bos_token_id == 1


def test_chat_template(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hel"}])
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<|im_start|>", "hel", "<|im_end|>"]


def test_streaming_detokenizer_is_the_fast_one(tokenizer: Any) -> None:
    assert isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer)


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'llama-bpe'"):
        tokenizer_definition({**tokenizer_metadata(), "tokenizer.ggml.pre": "llama-bpe"})
