"""The registry of adapters, and the built-in ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qsdpa_patch
from qsdpa_patch import Adapter
from qsdpa_patch.adapter_registry import GENERIC, adapter_for
from qsdpa_patch.settings import installed_model_types

MAPPED_BY_MLX_LM = {"mistral"}
"""Model types without a module of their own."""


def test_built_in_adapters_speak_for_models_that_exist() -> None:
    names = {name for adapter in qsdpa_patch.adapters() for name in adapter.model_types}
    assert names - MAPPED_BY_MLX_LM <= installed_model_types()


def test_families() -> None:
    wanted = {
        "llama": "llama", "qwen3_5": "qwen", "gemma4_text": "gemma", "mistral4": "mistral",
        "deepseek_v3": "deepseek", "gpt_oss": "gpt_oss", "phi3": "generic",
    }  # fmt: skip
    assert {model: adapter_for(model).name for model in wanted} == wanted


def test_registering() -> None:
    mine = Adapter(name="mine", model_types=("llama", "my_model"))
    qsdpa_patch.register_adapter(mine)
    assert adapter_for("llama") is adapter_for("my_model") is mine
    with pytest.raises(ValueError, match="'mine' is registered already"):
        qsdpa_patch.register_adapter(Adapter(name="mine", model_types=("other",)))
    qsdpa_patch.unregister_adapter("mine")
    assert adapter_for("llama").name == "llama"
    assert adapter_for("my_model") is GENERIC


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"give a qsdpa_patch\.Adapter"):
        qsdpa_patch.register_adapter("llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'llama' is registered already"):
        qsdpa_patch.register_adapter(Adapter(name="llama", model_types=("x",)))
    with pytest.raises(ValueError, match="'llama' is built in"):
        qsdpa_patch.unregister_adapter("llama")
    with pytest.raises(ValueError, match="'x' is not registered"):
        qsdpa_patch.unregister_adapter("x")
    with pytest.raises(ValueError, match="give a tuple of model types"):
        Adapter(name="x", model_types="llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"latent=.*name only model types of this adapter"):
        Adapter(name="x", model_types=("a",), latent=("b",))


def test_an_entry_point_is_loaded_with_its_target(tmp_path: Path) -> None:
    """A distribution on the path offers one good adapter and one that fails; neither stops its model's import."""
    (tmp_path / "their_model.py").write_text("")
    (tmp_path / "their_other_model.py").write_text("")
    (tmp_path / "their_adapter.py").write_text(
        "from qsdpa_patch import Adapter\nADAPTER = Adapter(name='theirs', model_types=('their_model',))\n"
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[qsdpa_patch.adapters]\nmlx_lm.models.their_model = their_adapter:ADAPTER\n"
        "their_model = their_adapter:ADAPTER\nthere.is.none = nowhere:ADAPTER\n"
        "x.their_other_model = nowhere:ADAPTER\n"
    )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import qsdpa_patch
from qsdpa_patch.adapter_registry import adapter_for
qsdpa_patch.enable()
assert "their_adapter" not in sys.modules
import mlx_lm.models
mlx_lm.models.__path__.append({str(tmp_path)!r})
import mlx_lm.models.their_model
print(adapter_for("their_model").name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "theirs\n", done.stderr
