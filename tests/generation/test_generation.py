"""mlx-lm's own ways to generate, over quantized caches: greedy, speculative, batched, from a saved or shared prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import batch_generate, load
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as mlx_lm_cache

import qsdpa_patch
from qsdpa_patch import caches
from tests.qsdpa_patch.demo.tiny_model import write_tiny_model

PROMPT = [40 + (7 * i) % 90 for i in range(61)]
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(str(folder))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, loaded: Any) -> Any:
    """A draft that agrees with the model now and then: the same weights, disturbed."""
    model, _ = load(str(write_tiny_model(tmp_path_factory.mktemp("draft"))))
    mx.random.seed(5)
    layer = model.layers[1].self_attn.o_proj
    layer.weight = layer.weight + 0.05 * mx.random.normal(layer.weight.shape)
    return model


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with qsdpa_patch.enabled():
        yield


def greedy(model: Any, prompt: list[int], cache: list[Any] | None = None, **options: Any) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=TOKENS, prompt_cache=cache, **options)
    return [int(token) for token, _ in islice(steps, TOKENS)]


def quantized_caches(model: Any, bits: int = 8) -> list[Any]:
    """Caches that are quantized from the first token on."""
    made = mlx_lm_cache.make_prompt_cache(model)
    return [cache.to_quantized(group_size=64, bits=bits) for cache in made]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("start", [0, 70])
def test_greedy(loaded: Any, bits: int, start: int) -> None:
    """Half of the prompt is processed over the quantized cache; with ``start`` 70 it is quantized while generating."""
    model, _ = loaded
    cache = mlx_lm_cache.make_prompt_cache(model)
    tokens = greedy(model, PROMPT, cache, kv_bits=bits, quantized_kv_start=start, prefill_step_size=30)
    assert len(tokens) == TOKENS
    assert all(type(layer) is caches.QuantizedKVCache for layer in cache)
    assert cache[0].key_format.bits == bits
    if bits == 8:
        assert tokens == greedy(model, PROMPT)


def test_separate_bits_for_keys_and_values(loaded: Any) -> None:
    model, _ = loaded
    cache = mlx_lm_cache.make_prompt_cache(model)
    with qsdpa_patch.enabled(key_bits=8, value_bits="mxfp4"):
        greedy(model, PROMPT, cache, kv_bits=4, quantized_kv_start=0)
    assert (str(cache[0].key_format), str(cache[0].value_format)) == ("8-bit g64", "mxfp4")


@pytest.mark.parametrize("draft_tokens", [1, 3, 15])
def test_speculative_decoding_gives_the_same_tokens(loaded: Any, draft: Any, draft_tokens: int) -> None:
    """Up to 16 query rows at a time, and trims after every rejected guess."""
    model, _ = loaded
    steps = speculative_generate_step(
        mx.array(PROMPT), model, draft, num_draft_tokens=draft_tokens, max_tokens=TOKENS,
        prompt_cache=quantized_caches(model) + quantized_caches(draft),
    )  # fmt: skip
    made = [(int(token), from_draft) for token, _, from_draft in islice(steps, TOKENS)]
    assert [token for token, _ in made] == greedy(model, PROMPT, quantized_caches(model))
    accepted = sum(from_draft for _, from_draft in made)
    assert 0 < accepted < TOKENS - 1, "the draft was always or never right, so nothing was trimmed"


def test_speculative_decoding_quantizes_its_own_caches(loaded: Any, draft: Any) -> None:
    model, _ = loaded
    steps = speculative_generate_step(
        mx.array(PROMPT), model, draft, num_draft_tokens=4, max_tokens=TOKENS, kv_bits=8, quantized_kv_start=0
    )
    assert [int(token) for token, *_ in islice(steps, TOKENS)] == greedy(model, PROMPT)


def test_a_batch_gives_what_each_prompt_gives_alone(loaded: Any) -> None:
    model, tokenizer = loaded
    prompts = [PROMPT, PROMPT[:7], PROMPT[20:], PROMPT[:1]]
    alone = [greedy(model, prompt, quantized_caches(model)) for prompt in prompts]
    options = {"max_tokens": TOKENS, "return_token_ids": True, "completion_batch_size": 3, "prefill_batch_size": 2}
    batch = batch_generate(model, tokenizer, prompts, kv_bits=8, kv_group_size=64, **options)
    stop = set(tokenizer.eos_token_ids)
    for ids, wanted in zip(batch.token_ids, alone, strict=True):
        cut = next((i for i, token in enumerate(wanted) if token in stop), len(wanted))
        assert ids == wanted[:cut]


def test_batches_of_caches_that_came_quantized(loaded: Any) -> None:
    """Quantized prompt caches, handed to a batch and back."""
    model, tokenizer = loaded
    given = [quantized_caches(model) for _ in range(2)]
    for cache, prompt in zip(given, (PROMPT, PROMPT[:30]), strict=True):
        model(mx.array(prompt[:-1])[None], cache=cache)
    batch = batch_generate(
        model, tokenizer, [[PROMPT[-1]], [PROMPT[29]]], given, max_tokens=6, return_prompt_caches=True,
        return_token_ids=True,
    )  # fmt: skip
    wanted = greedy(model, PROMPT, quantized_caches(model))[:6]
    assert batch.token_ids[0] == wanted[: len(batch.token_ids[0])]
    assert all(type(layer) is caches.QuantizedKVCache for cache in batch.caches for layer in cache)


def test_a_prompt_shared_through_the_lru_cache(loaded: Any) -> None:
    """As the server keeps prompts: a longer one is trimmed back to the common beginning."""
    model, _ = loaded
    shared = mlx_lm_cache.LRUPromptCache()
    cache = quantized_caches(model)
    first = PROMPT + [50, 51, 52]
    model(mx.array(first)[None], cache=cache)
    shared.insert_cache("model", first, cache)
    other = [*PROMPT, 90, 91, 92, 93]
    found, rest = shared.fetch_nearest_cache("model", other)
    assert rest == other[len(PROMPT) :]
    assert greedy(model, rest, found) == greedy(model, other, quantized_caches(model))
    assert shared.nbytes == sum(layer.nbytes for layer in cache)


def rotating_caches(model: Any) -> list[Any]:
    """What ``--max-kv-size 32`` gives for a model without a ``make_cache`` of its own."""
    return [mlx_lm_cache.RotatingKVCache(32, keep=4) for _ in model.layers]


@pytest.mark.parametrize("make", [mlx_lm_cache.make_prompt_cache, rotating_caches])
def test_a_prompt_saved_to_a_file(loaded: Any, tmp_path: Path, make: Callable[[Any], list[Any]]) -> None:
    model, _ = loaded
    cache = make(model)
    greedy(model, PROMPT, cache, kv_bits=4, quantized_kv_start=0)
    file = str(tmp_path / "prompt.safetensors")
    mlx_lm_cache.save_prompt_cache(file, cache, {"model": "tiny"})
    again, metadata = mlx_lm_cache.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"model": "tiny"}
    assert [type(layer) for layer in again] == [type(layer) for layer in cache]
    assert greedy(model, [45, 46], again) == greedy(model, [45, 46], cache)


def test_a_prompt_cache_of_other_bits_stays_as_it_is_and_says_so(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = loaded
    cache = quantized_caches(model, bits=8)
    tokens = greedy(model, PROMPT, cache, kv_bits=4, quantized_kv_start=0)
    assert tokens == greedy(model, PROMPT, quantized_caches(model, bits=8))
    assert cache[0].key_format.bits == 8
    assert caplog.text.count("came quantized as 8-bit g64/8-bit g64 and stays so; asked for: 4-bit g64") == len(cache)
    assert "came quantized as 8-bit" in str(qsdpa_patch.report())


def test_an_adapter_that_raises_leaves_the_cache_alone_and_says_so(
    loaded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def plan_layer(layer: qsdpa_patch.Layer) -> qsdpa_patch.LayerPlan:
        raise KeyError("layer_types")

    qsdpa_patch.register_adapter(qsdpa_patch.Adapter(name="theirs", model_types=("llama",), plan_layer=plan_layer))
    model, _ = loaded
    cache = mlx_lm_cache.make_prompt_cache(model)
    assert greedy(model, PROMPT, cache, kv_bits=4, quantized_kv_start=0) == greedy(model, PROMPT)
    assert all(type(layer) is mlx_lm_cache.KVCache for layer in cache)
    assert "adapter 'theirs' failed: 'layer_types'" in str(qsdpa_patch.report())
    assert caplog.text.count("adapter 'theirs' failed for llama: caches stay as they are") == 1


def test_a_rotating_cache_is_quantized(loaded: Any) -> None:
    """``--max-kv-size`` with ``--kv-bits``, which stock refuses; the window is crossed."""
    model, _ = loaded
    cache = rotating_caches(model)
    tokens = greedy(model, PROMPT, cache, kv_bits=8, quantized_kv_start=0, prefill_step_size=20)
    assert all(type(layer) is caches.QuantizedRotatingKVCache for layer in cache)
    assert tokens == greedy(model, PROMPT, rotating_caches(model), prefill_step_size=20)


def run(folder: Path, module: str, *arguments: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("QSDPA_")} | environment
    command = [sys.executable, "-m", "mlx_lm", module, "--model", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_mlx_lm(folder: Path, tmp_path: Path) -> None:
    """``cache_prompt`` and ``generate --prompt-cache-file`` with the start-up hook, and generation without a file."""
    pytest.importorskip("_qsdpa_patch_startup", reason="the package is not installed")
    file = str(tmp_path / "prompt.safetensors")
    flags = ["--kv-bits", "8", "--quantized-kv-start", "0"]
    run(folder, "cache_prompt", "--prompt", "hello hello 12", "--prompt-cache-file", file, *flags, QSDPA_PATCH="1")
    _, metadata = mx.load(file, return_metadata=True)
    assert "QSDPAQuantizedKVCache" in json.dumps(metadata)
    options = ["--prompt", "hello", "--max-tokens", "8", "--temp", "0"]
    from_file = run(folder, "generate", "--prompt-cache-file", file, *options, *flags, QSDPA_PATCH="1")
    assert "Generation: " in from_file
    plain = run(folder, "generate", *options, *flags, QSDPA_PATCH="1").split("==========")[1]
    assert plain == run(folder, "generate", *options).split("==========")[1]
