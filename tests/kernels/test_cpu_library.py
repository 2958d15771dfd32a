"""Compiling, caching and loading the CPU library, and what happens where that fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.cpu import backend, compiler, library, library_cache
from qsdpa_patch.kernels.cpu.compiler import Compiler, CompilerError
from qsdpa_patch.kernels.cpu.self_check import wrong_results
from tests.attention_cases import Case, build

pytestmark = pytest.mark.skipif(not backend.is_available()[0], reason=backend.is_available()[1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory; the process's own library is elsewhere."""
    library.load_library()
    monkeypatch.setenv("QSDPA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def script(path: Path, text: str) -> Compiler:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return Compiler((str(path),), "a script")


@pytest.fixture
def copying(tmp_path: Path) -> Compiler:
    """A compiler that takes no time: its output is the library that is there already. It counts its runs."""
    done = library.load_library().path
    return script(
        tmp_path / "copying",
        f'echo run >> {tmp_path}/runs\nwhile [ "$1" != -o ]; do shift; done\ncp "{done}" "$2"',
    )


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def test_the_cached_library_is_loaded_again(cache: Path, copying: Compiler, tmp_path: Path) -> None:
    first = library.find_or_build(copying)
    second = library.find_or_build(copying)
    assert first.path == second.path
    assert first.path.parent == cache
    assert (first.compile_seconds > 0, second.compile_seconds) == (True, 0)
    assert runs(tmp_path) == 1
    assert [p.name for p in cache.iterdir()] == [first.path.name]


def test_another_compiler_builds_another_library(cache: Path, copying: Compiler, tmp_path: Path) -> None:
    first = library.find_or_build(copying)
    second = library.find_or_build(Compiler(copying.command, "a newer script"))
    assert first.path != second.path
    assert runs(tmp_path) == 2


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty"])
def test_a_damaged_file_is_built_again(
    cache: Path, copying: Compiler, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = library.find_or_build(copying).path
    whole = path.read_bytes()
    path.unlink()  # not in place: this process has it mapped
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "overwritten": whole[:-9] + b"123456789", "empty": b""}[damage]
    )
    with caplog.at_level(logging.WARNING):
        again = library.find_or_build(copying)
    assert again.path.read_bytes() == whole
    assert runs(tmp_path) == 2
    assert "damaged" in caplog.text


def test_several_processes_may_start_at_once(cache: Path, copying: Compiler) -> None:
    program = (
        "from qsdpa_patch.kernels.cpu import library\n"
        "from qsdpa_patch.kernels.cpu.compiler import Compiler\n"
        f"print(library.find_or_build(Compiler({copying.command!r}, 'a script')).path)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(paths) == 1
    assert [str(p) for p in cache.iterdir()] == list(paths)


def test_where_the_cache_cannot_be_written_the_library_is_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copying: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QSDPA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        built = library.find_or_build(copying)
    assert built.path.exists()
    assert "cannot be written" in caplog.text


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CompilerError, match="none of cc, gcc and clang is on the path"):
        compiler.find_compiler()
    monkeypatch.setenv("CC", "no-such-cc -O1")
    with pytest.raises(CompilerError, match="CC='no-such-cc -O1' is not on the path"):
        compiler.find_compiler()


@pytest.mark.parametrize("tools", [True, False])
def test_a_stand_in_of_macos_is_not_run_without_the_tools(monkeypatch: pytest.MonkeyPatch, tools: bool) -> None:
    """It would open a dialog, at ``qsdpa doctor`` say."""
    ran: list[str] = []

    def run_within(time_limit: float, command: Sequence[str], *_: object) -> tuple[int | None, str]:
        ran.append(Path(command[0]).name)
        return (0 if tools else 2), "some version"

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiler, "run_within", run_within)
    if tools:
        assert compiler.find_compiler().command == ("/usr/bin/cc",)
        assert ran == ["xcode-select", "cc"]
        return
    with pytest.raises(CompilerError, match=r"no C compiler: /usr/bin/cc is there, but .* xcode-select --install"):
        compiler.find_compiler()
    assert ran == ["xcode-select"]


def test_the_processor_of_a_mac_is_found_whatever_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[0])
        return subprocess.CompletedProcess(command, 0, "Apple M3 Max\n")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", run)
    assert "Apple M3 Max" in library.host_cpu.__wrapped__()
    assert os.path.isabs(asked[0])


def test_cc_may_hold_arguments(monkeypatch: pytest.MonkeyPatch, copying: Compiler) -> None:
    monkeypatch.setenv("CC", f"{copying.command[0]} -mcpu=some")
    assert compiler.find_compiler().command == (copying.command[0], "-mcpu=some")


def test_a_failing_compiler_is_quoted(cache: Path, tmp_path: Path) -> None:
    failing = script(tmp_path / "failing", 'echo "kernels.c:1: fatal error: no headers here" >&2\nexit 1')
    with pytest.raises(CompilerError, match=r"failing failed: kernels\.c:1: fatal error: no headers here"):
        library.find_or_build(failing)
    assert list(cache.iterdir()) == []


def test_a_hanging_compiler_is_killed_with_its_children(tmp_path: Path) -> None:
    hanging = script(tmp_path / "hanging", f"sleep 600 &\necho $! > {tmp_path}/child\nwait")
    with pytest.raises(CompilerError, match="did not end within 1 s"):
        hanging.compile(tmp_path / "x.c", tmp_path / "x.so", time_limit=1.0)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie that nobody has waited for does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.parametrize("what", ["missing", "failing", "not a library"])
def test_the_op_goes_on_without_the_kernels(what: str, tmp_path: Path) -> None:
    """In a process of its own: what a library is, is settled once in a process."""
    commands = {
        "missing": "no-such-compiler",
        "failing": script(tmp_path / "failing", "exit 3").command[0],
        "not a library": script(tmp_path / "odd", 'while [ "$1" != -o ]; do shift; done\necho nonsense > "$2"').command[
            0
        ],
    }
    program = (
        "import logging; logging.basicConfig()\n"
        "from qsdpa_patch.kernels.cpu import backend\n"
        "from tests.attention_cases import Case, build\n"
        "call = build(Case(seed=1))\n"
        "for _ in range(2): print(backend.has_fused_kernel(call.signature))\n"
        "print(backend.describe())\n"
    )
    environment = {**os.environ, "CC": commands[what], "QSDPA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    first, second, facts = done.stdout.splitlines()
    assert first == second
    assert first.startswith("(False, ")
    assert "compiler" in facts
    assert done.stderr.count("no CPU kernels") == (0 if what == "missing" else 1)


def test_wrong_results_are_noticed() -> None:
    assert wrong_results(backend.attend) == ""
    assert "differ from the reference" in wrong_results(lambda call: backend.attend(call) * 1.001)
    assert "differ from the reference" in wrong_results(lambda call: backend.attend(call) + mx.nan)


def test_threads_are_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.thread_count.cache_clear()
    monkeypatch.setenv("QSDPA_CPU_THREADS", "3")
    assert backend.thread_count() == 3
    backend.thread_count.cache_clear()
    monkeypatch.setenv("QSDPA_CPU_THREADS", "many")
    with pytest.raises(ValueError, match="QSDPA_CPU_THREADS='many'"):
        backend.thread_count()
    monkeypatch.delenv("QSDPA_CPU_THREADS")
    backend.thread_count.cache_clear()
    assert backend.thread_count() >= 1


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QSDPA_CACHE_DIR", str(tmp_path))
    assert library_cache.cache_directory() == tmp_path
    monkeypatch.delenv("QSDPA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert library_cache.cache_directory().name == "qsdpa_patch"


def test_describe_names_compiler_library_and_threads() -> None:
    backend.has_fused_kernel(build(Case(seed=1)).signature)
    facts = backend.describe()
    assert facts["library"] == str(library.load_library().path)
    assert {"compiler", "cache", "threads", "compile time"} <= set(facts)
    assert "failure" not in facts
