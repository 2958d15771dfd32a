"""The wheel: what is in it, that it works from elsewhere, and that it brings no foreign top-level package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout and unpacked."""
    if find_spec("pip") is None:
        pytest.skip("pip is not in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the package index that has hatchling is out of reach")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_top_level(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"qsdpa_patch", "qsdpa_patch.pth", "_qsdpa_patch_startup.py"}


def test_every_source_is_there(unpacked: Path) -> None:
    moved = {"qsdpa_patch/qsdpa_patch.pth", "qsdpa_patch/_startup.py"}  # to the top level
    for folder in ("qsdpa_patch", "kernels", "adapters"):
        installed = unpacked if folder == "qsdpa_patch" else unpacked / "qsdpa_patch"
        files = [
            path
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc" and path.name != ".DS_Store"
        ]
        assert files
        names = {path.relative_to(ROOT).as_posix() for path in files} - moved
        assert [name for name in sorted(names) if not (installed / name).is_file()] == []


def test_it_works_from_there(unpacked: Path, tmp_path: Path) -> None:
    """The start-up hook and the package of the wheel, ahead of whatever is installed, from another folder."""
    code = (
        f"import sys, site; sys.path.insert(0, {str(unpacked)!r}); site.addsitedir({str(unpacked)!r});"
        "import mlx_lm.models.llama as llama, qsdpa_patch;"
        "from qsdpa_patch.kernels import backends;"
        f"assert qsdpa_patch.__file__.startswith({str(unpacked)!r}), qsdpa_patch.__file__;"
        "print(qsdpa_patch.is_enabled(), hasattr(llama.scaled_dot_product_attention, '__wrapped__'))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("QSDPA_")} | {"QSDPA_PATCH": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env,
                          check=False)  # fmt: skip
    assert done.stdout == "True True\n", done.stderr
