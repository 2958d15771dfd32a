"""The system's C compiler: which one, with which flags, and a run of it that always ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Compiler", "CompilerError", "find_compiler"]

TIME_LIMIT = 120.0
"""Seconds that one run of the compiler may take."""

_FLAGS = (
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
)
# Nothing of -ffast-math: masks are -inf, and its start-up code would flush denormals for the whole process.
_HOST_FLAGS = (("-march=native",), ("-mcpu=native",), ())
"""What compiles for the very host, by preference: not every clang takes the first on arm64."""

ALL_FLAGS = (_FLAGS, _HOST_FLAGS)
"""All that a build depends on besides compiler, CPU and sources."""


class CompilerError(Exception):
    """The compiler failed, hung or is missing; the argument is a short message for the user."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler: ``command`` as ``$CC`` may give it, ``version`` as it reports itself."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{' '.join(self.command)} ({self.version})"

    def compile(self, source: Path, output: Path, time_limit: float = TIME_LIMIT) -> tuple[str, ...]:
        """Build the shared library ``output`` from ``source`` for this host; returns the flags that did it.

        Raises:
            CompilerError: with what the compiler said of the first error, or that it ran past ``time_limit`` seconds.
        """
        first_failure = ""
        for host_flags in _HOST_FLAGS:
            flags = (*_FLAGS, *host_flags)
            failure = _failure([*self.command, *flags, str(source), "-o", str(output), "-lm"], time_limit)
            if not failure:
                return flags
            first_failure = first_failure or failure
        raise CompilerError(f"{self.command[0]} failed: {first_failure}")


def find_compiler() -> Compiler:
    """The compiler of ``$CC``, or else the first of ``cc``, ``gcc`` and ``clang`` on the path.

    Raises:
        CompilerError: there is none, or it does not run.
    """
    chosen = os.environ.get("CC", "")
    candidates = [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]
    for command in candidates:
        path = shutil.which(command[0]) if command else None
        if path:
            return Compiler((path, *command[1:]), _version(path))
    if chosen:
        raise CompilerError(f"no C compiler: CC={chosen!r} is not on the path")
    raise CompilerError("no C compiler: none of cc, gcc and clang is on the path, and CC is not set")


def _version(path: str) -> str:
    status, output = _run([path, "--version"], time_limit=20.0)
    if status is None:
        raise CompilerError(f"{path} --version did not end within 20 s")
    return output.splitlines()[0].strip() if status == 0 and output.strip() else "unknown version"


def _failure(command: list[str], time_limit: float) -> str:
    """Why ``command`` failed, in one line; empty when it did not."""
    status, output = _run(command, time_limit)
    if status == 0:
        return ""
    if status is None:
        raise CompilerError(f"{command[0]} did not end within {time_limit:g} s")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit status {status}"])[0][:300]


def _run(command: list[str], time_limit: float) -> tuple[int | None, str]:
    """Exit status (``None``: past the time limit, and killed with all that it started) and output."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
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
