"""The system's C and C++ compilers: which one, with which flags, and a run of it that always ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsdpa_patch.kernels.messages import first_error

__all__ = ["CXX", "Compiler", "CompilerError", "Language", "find_compiler", "run_within"]

TIME_LIMIT = 120.0
"""Seconds that one run of the compiler may take."""


@dataclass(frozen=True)
class Language:
    """How a shared library is made of sources in one language.

    variable: of the environment that names a compiler; else the first of ``commands`` on the path is taken.
    host_flags: alternatives, by preference, added to ``flags``.
    """

    name: str
    variable: str
    commands: tuple[str, ...]
    flags: tuple[str, ...]
    host_flags: tuple[tuple[str, ...], ...] = ((),)


C = Language(
    name="C",
    variable="CC",
    commands=("cc", "gcc", "clang"),
    # Nothing of -ffast-math: masks are -inf, and its start-up code would flush denormals for the whole process.
    flags=(
        "-O3",
        "-std=gnu11",
        "-shared",
        "-fPIC",
        "-pthread",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-w",
    ),
    # What compiles for the very host: not every clang takes the first on arm64.
    host_flags=(("-march=native",), ("-mcpu=native",), ()),
)

CXX = Language(
    name="C++",
    variable="CXX",
    commands=("c++", "g++", "clang++"),
    flags=("-O2", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w"),
)


class CompilerError(Exception):
    """The compiler failed, hung or is missing; the argument is a short message for the user."""


@dataclass(frozen=True)
class Compiler:
    """A compiler: ``command`` as ``$CC`` may give it, ``version`` as it reports itself."""

    command: tuple[str, ...]
    version: str
    language: Language = C

    def __str__(self) -> str:
        return f"{' '.join(self.command)} ({self.version})"

    def compile(
        self, source: Path, output: Path, time_limit: float = TIME_LIMIT, arguments: Sequence[str] = ("-lm",)
    ) -> tuple[str, ...]:
        """Build the shared library ``output`` from ``source`` for this host; returns the flags that did it.

        Raises:
            CompilerError: with what the compiler said of the first error, or that it ran past ``time_limit`` seconds.
        """
        first_failure = ""
        for host_flags in self.language.host_flags:
            flags = (*self.language.flags, *host_flags)
            failure = _failure([*self.command, *flags, str(source), "-o", str(output), *arguments], time_limit)
            if not failure:
                return flags
            first_failure = first_failure or failure
        raise CompilerError(f"{self.command[0]} failed: {first_failure}")


def find_compiler(language: Language = C) -> Compiler:
    """The compiler that the environment names (``$CC``, ``$CXX``), or else the first of the usual ones on the path.

    Raises:
        CompilerError: there is none, or it does not run.
    """
    variable = language.variable
    chosen = os.environ.get(variable, "")
    candidates = [shlex.split(chosen)] if chosen else [[command] for command in language.commands]
    for command in candidates:
        path = shutil.which(command[0]) if command else None
        if path and _is_stand_in(path):
            raise CompilerError(
                f"no {language.name} compiler: {path} is there, but not Apple's command line tools that it stands for: "
                "xcode-select --install gets them"
            )
        if path:
            return Compiler((path, *command[1:]), _version(path), language)
    if chosen:
        raise CompilerError(f"no {language.name} compiler: {variable}={chosen!r} is not on the path")
    *others, last = language.commands
    raise CompilerError(
        f"no {language.name} compiler: none of {', '.join(others)} and {last} is on the path, and {variable} is not set"
    )


def _is_stand_in(path: str) -> bool:
    """Whether ``path`` is a command of macOS that, run without Apple's tools, opens a dialog that offers them."""
    if sys.platform != "darwin" or Path(path).parent != Path("/usr/bin"):
        return False
    status, _ = run_within(20.0, ["/usr/bin/xcode-select", "--print-path"])
    return status != 0


def _version(path: str) -> str:
    status, output = run_within(20.0, [path, "--version"])
    if status is None:
        raise CompilerError(f"{path} --version did not end within 20 s")
    return output.splitlines()[0].strip() if status == 0 and output.strip() else "unknown version"


def _failure(command: list[str], time_limit: float) -> str:
    """Why ``command`` failed, in one line; empty when it did not."""
    status, output = run_within(time_limit, command)
    if status == 0:
        return ""
    if status is None:
        raise CompilerError(f"{command[0]} did not end within {time_limit:g} s")
    return first_error(output) or f"exit status {status}"


def run_within(
    time_limit: float, command: Sequence[str], environment: Mapping[str, str] = os.environ
) -> tuple[int | None, str]:
    """Exit status (``None``: past the time limit, and killed with all that it started) and output of ``command``."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, "LC_ALL": "C"},
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise CompilerError(f"{command[0]} does not start: {error}") from error
    try:
        output, _ = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""
    return process.returncode, output
