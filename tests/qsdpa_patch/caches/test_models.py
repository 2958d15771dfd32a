"""Quantized caches under mlx-lm's own models and generators, with nothing patched.

The reference is the same model over mlx-lm's caches, fed with rows that were quantized and dequantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import deepseek_v3, gemma3_text, llama, llama4

from qsdpa_patch.caches import quantized
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import quantize

FORMAT = Format.affine(8, 32)
VOCABULARY = 128


def make_llama() -> Any:
    args = llama.ModelArgs(
        model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )  # fmt: skip
    return ready(llama.Model(args))


def make_gemma() -> Any:
    """Sliding windows of 8 rows in one layer of two."""
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=VOCABULARY, sliding_window=8, sliding_window_pattern=2,
        query_pre_attn_scalar=32,
    )  # fmt: skip
    return ready(gemma3_text.Model(args))


def make_llama4() -> Any:
    """Chunks of 8 rows in three layers of four."""
    text_config = {
        "attention_bias": False, "attention_chunk_size": 8, "head_dim": 32, "hidden_size": 64,
        "interleave_moe_layer_step": 9, "intermediate_size": 64, "intermediate_size_mlp": 64,
        "max_position_embeddings": 64, "model_type": "llama4", "num_attention_heads": 4, "num_experts_per_tok": 1,
        "num_hidden_layers": 4, "num_key_value_heads": 2, "num_local_experts": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 1e4, "use_qk_norm": True, "vocab_size": VOCABULARY,
    }  # fmt: skip
    return ready(llama4.Model(llama4.ModelArgs(text_config, "llama4")))


def make_deepseek() -> Any:
    """Absorbed MLA."""
    args = deepseek_v3.ModelArgs(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=64, q_lora_rank=32, qk_rope_head_dim=32, v_head_dim=32,
        qk_nope_head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    return ready(deepseek_v3.Model(args))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": make_llama,
    "gemma3": make_gemma,
    "llama4": make_llama4,
    "deepseek_v3": make_deepseek,
}


def ready(model: Any) -> Any:
    """``model`` with weights large enough that attention matters."""
    mx.random.seed(0)
    model.update(tree_map(lambda x: x + 0.2 * mx.random.normal(x.shape), model.parameters()))
    mx.eval(model.parameters())
    return model


def quantized_caches(model: Any, latent: bool) -> list[Any]:
    made = mlx_lm_cache.make_prompt_cache(model)
    return [quantized(cache, FORMAT, latent=latent) for cache in made]


def reference_caches(model: Any, latent: bool) -> list[Any]:
    """Mlx-lm's caches, whose rows go through the format first."""

    def through_format(cache: Any) -> Any:
        update = cache.update_and_fetch

        def update_and_fetch(keys: mx.array, values: mx.array) -> Any:
            return update(
                quantize(keys, FORMAT).dequantize(), values if latent else quantize(values, FORMAT).dequantize()
            )

        cache.update_and_fetch = update_and_fetch
        return cache

    return [through_format(cache) for cache in mlx_lm_cache.make_prompt_cache(model)]


def tokens(count: int, seed: int = 0) -> list[int]:
    drawn: Any = mx.random.randint(0, VOCABULARY, (count,), key=mx.random.key(seed)).tolist()
    return list(drawn)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [[13] + [1] * 12, [1] * 10 + [5, 1, 3, 1, 1]], ids=["prompt first", "one by one"])
def test_logits_are_those_over_the_values_that_are_stored(name: str, chunks: list[int]) -> None:
    model, latent = MODELS[name](), name == "deepseek_v3"
    ours, reference = quantized_caches(model, latent), reference_caches(model, latent)
    for i, count in enumerate(chunks):
        prompt = mx.array([tokens(count, i)])
        actual, expected = model(prompt, cache=ours), model(prompt, cache=reference)
        assert mx.abs(actual - expected).max() <= 1e-4 * mx.abs(expected).max()


def greedy(model: Any, prompt: list[int], count: int, cache: list[Any]) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_a_batch_generates_what_each_prompt_alone_does(name: str) -> None:
    """Prompts of different lengths, more than fit at once, so that batches shrink, grow and are padded."""
    model, latent = MODELS[name](), name == "deepseek_v3"
    prompts = [tokens(count, count) for count in (3, 17, 9, 2, 12)]
    counts = [6, 14, 3, 9, 5]
    generator: Any = BatchGenerator(
        model, max_tokens=20, prefill_batch_size=2, completion_batch_size=3, prefill_step_size=8
    )
    caches = [quantized_caches(model, latent) for _ in prompts]
    uids = generator.insert(prompts, counts, caches=caches)
    generated: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            generated[response.uid].append(response.token)
    for uid, prompt, count in zip(uids, prompts, counts):
        assert generated[uid] == greedy(model, prompt, count, quantized_caches(model, latent))


def test_speculative_decoding_gives_what_plain_decoding_does() -> None:
    model, draft = make_llama(), make_llama()
    draft.update(tree_map(lambda x: x + 0.01 * mx.random.normal(x.shape), model.parameters()))
    prompt = tokens(11)
    steps = speculative_generate_step(
        mx.array(prompt),
        model,
        draft,
        num_draft_tokens=4,
        max_tokens=24,
        prompt_cache=quantized_caches(model, False) + quantized_caches(draft, False),
    )
    drafted = list(steps)
    assert {from_draft for _, _, from_draft in drafted} == {True, False}
    assert [int(token) for token, _, _ in drafted] == greedy(model, prompt, 24, quantized_caches(model, False))


def test_a_shared_prompt_is_reused() -> None:
    """LRUPromptCache copies a longer prompt's caches and trims them to what two prompts share."""
    model = make_llama()
    prompt = tokens(15)
    store = mlx_lm_cache.LRUPromptCache()
    caches = quantized_caches(model, False)
    model(mx.array([prompt]), cache=caches)
    store.insert_cache("model", prompt, caches)
    other = prompt[:9] + tokens(4, 1)
    reused, rest = store.fetch_nearest_cache("model", other)
    assert rest == other[9:]
    assert greedy(model, rest, 8, reused) == greedy(model, other, 8, quantized_caches(model, False))
    again, rest = store.fetch_nearest_cache("model", [*prompt, 1])
    assert rest == [1]
    assert again[0].offset == len(prompt)
