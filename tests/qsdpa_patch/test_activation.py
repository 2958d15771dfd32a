"""enable and disable on the real mlx-lm: what is replaced, and that all of it comes back."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from typing import Any

import pytest

import qsdpa_patch
from qsdpa_patch import activation
from qsdpa_patch.dispatcher import router
from qsdpa_patch.errors import QSDPAWarning
from qsdpa_patch.targets import TARGETS, TESTED_VERSIONS, Target, source_hash
from tests.threads import run_in_threads

MODULES = ("mlx_lm.generate", "mlx_lm.server", "mlx_lm.models.llama", "mlx_lm.models.gemma3_text")


def snapshot() -> dict[tuple[str, str], int]:
    """The identity of every attribute of every loaded module of mlx-lm, and of its cache classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm"):
            for attribute, value in vars(module).items():
                found[name, attribute] = id(value)
                if isinstance(value, type) and value.__module__ == "mlx_lm.models.cache":
                    found |= {(f"{name}.{attribute}", k): id(v) for k, v in vars(value).items()}
    return found


def run(code: str, **environment: str) -> str:
    """The output of ``code`` in a fresh interpreter."""
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith("QSDPA_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_comes_back_to_the_very_object() -> None:
    for module in MODULES:
        importlib.import_module(module)
    before = snapshot()
    qsdpa_patch.enable()
    during = snapshot()
    changed = {key for key in before if during[key] != before[key]}
    assert {
        ("mlx_lm.models.base", "scaled_dot_product_attention"),
        ("mlx_lm.models.llama", "scaled_dot_product_attention"),
        ("mlx_lm.models.gemma3_text", "scaled_dot_product_attention"),
        ("mlx_lm.generate", "make_prompt_cache"),
        ("mlx_lm.server", "make_prompt_cache"),
        ("mlx_lm.generate", "maybe_quantize_kv_cache"),
    } <= changed
    qsdpa_patch.disable()
    assert snapshot() == before


def test_every_module_that_imports_the_dispatcher_is_covered() -> None:
    """In a fresh interpreter: half of the models imported before ``enable``, half after."""
    out = run(
        """
        import importlib, pkgutil, sys, warnings
        import qsdpa_patch, mlx_lm.models
        names = [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__) if m.name != "olmo"]
        load = lambda part: [importlib.import_module(f"mlx_lm.models.{n}") for n in part]
        load(names[::2])
        original = sys.modules["mlx_lm.models.base"].scaled_dot_product_attention
        qsdpa_patch.enable()
        load(names[1::2])
        name = "scaled_dot_product_attention"
        holders = [m for m in sys.modules.values() if name in vars(m) and m.__name__.startswith("mlx_lm.models.")]
        patched = sys.modules["mlx_lm.models.base"].scaled_dot_product_attention
        assert patched is not original and patched.__wrapped__ is original
        assert all(vars(m)[name] is patched for m in holders), [m for m in holders if vars(m)[name] is original]
        qsdpa_patch.disable()
        assert all(vars(m)[name] is original for m in holders)
        print(len(holders))
        """
    )
    assert int(out) >= 100


def test_import_of_the_package_leaves_mlx_lm_alone() -> None:
    assert run("import sys, qsdpa_patch; print('mlx_lm' in sys.modules)") == "False\n"


def test_enabling_before_mlx_lm_is_imported() -> None:
    out = run(
        """
        import sys, qsdpa_patch
        qsdpa_patch.enable()
        assert "mlx_lm" not in sys.modules
        from mlx_lm.models import llama, cache
        from mlx_lm.generate import maybe_quantize_kv_cache
        f = llama.scaled_dot_product_attention
        print(hasattr(f, "__wrapped__"), hasattr(maybe_quantize_kv_cache, "__wrapped__"))
        print(hasattr(cache, "QSDPAQuantizedKVCache"))
        qsdpa_patch.disable()
        print(llama.scaled_dot_product_attention is f.__wrapped__, hasattr(cache, "QSDPAQuantizedKVCache"))
        """
    )
    assert out == "True True\nTrue\nTrue False\n"


def test_a_second_call_updates_the_options_and_patches_nothing() -> None:
    importlib.import_module("mlx_lm.generate")
    qsdpa_patch.enable(key_bits=8)
    during = snapshot()
    qsdpa_patch.enable(key_bits=4, kernels="ops")
    assert snapshot() == during
    assert (router.settings.key_bits, router.settings.kernels) == (4, "ops")
    qsdpa_patch.disable()
    qsdpa_patch.disable()
    assert router.settings.key_bits is None


def test_a_bad_option_changes_nothing() -> None:
    importlib.import_module("mlx_lm.generate")
    before = snapshot()
    with pytest.raises(ValueError, match="key_bits=7"):
        qsdpa_patch.enable(key_bits=7)
    assert not qsdpa_patch.is_enabled()
    assert snapshot() == before
    qsdpa_patch.enable(value_bits=4)
    with pytest.raises(ValueError, match="kernels='x'"):
        qsdpa_patch.enable(kernels="x")
    assert qsdpa_patch.is_enabled()
    assert router.settings.value_bits == 4


def test_enabled_restores_what_was_in_force() -> None:
    with qsdpa_patch.enabled(key_bits=8):
        assert qsdpa_patch.is_enabled()
        with qsdpa_patch.enabled(key_bits=4):
            assert router.settings.key_bits == 4
        assert router.settings.key_bits == 8
    assert not qsdpa_patch.is_enabled()
    with pytest.raises(RuntimeError, match="inner"), qsdpa_patch.enabled():
        raise RuntimeError("inner")
    assert not qsdpa_patch.is_enabled()


def test_threads_that_enable_and_disable_leave_nothing_behind() -> None:
    importlib.import_module("mlx_lm.generate")
    before = snapshot()

    def toggle(_: int) -> None:
        for _ in range(20):
            qsdpa_patch.enable()
            qsdpa_patch.disable()

    run_in_threads(toggle, 4)
    qsdpa_patch.disable()
    assert snapshot() == before


def test_an_untested_version_warns_and_patches_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import base, cache

    monkeypatch.setattr(activation, "version", lambda name: {"mlx": "0.32.4", "mlx-lm": "0.99.0"}[name])
    monkeypatch.setattr(cache, "make_prompt_cache", lambda model, size, extra: [])
    monkeypatch.delattr(cache.RotatingKVCache, "to_quantized")
    original = base.scaled_dot_product_attention
    with pytest.warns(QSDPAWarning) as caught:
        qsdpa_patch.enable()
    messages = [str(w.message) for w in caught]
    assert any("mlx-lm 0.99.0 is not tested (tested: 0.32.2 up to, not including, 0.33)" in m for m in messages)
    assert any("cache.make_prompt_cache is not patched: it takes ('model', 'size', 'extra')" in m for m in messages)
    assert any("RotatingKVCache.to_quantized is not patched: it is not there" in m for m in messages)
    assert base.scaled_dot_product_attention is not original
    qsdpa_patch.disable()
    assert base.scaled_dot_product_attention is original


def test_a_missing_distribution_is_said() -> None:
    assert set(TESTED_VERSIONS) == {"mlx", "mlx-lm"}
    assert activation.untested_versions() == []


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_upstream_has_not_drifted(target: Target) -> None:
    """A patched function of mlx-lm whose source has changed has to be looked at, and its hash recorded anew."""
    original: Any = target.find(importlib.import_module(target.module))
    assert original is not None, f"{target.name} is gone"
    assert target.mismatch(original) == ""
    assert source_hash(original) == target.sha256, f"{target.name} has changed upstream"
