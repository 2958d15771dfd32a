"""mlx-lm's real server in a process of its own, started as a user would, plus a way to ask how it is doing.

Run as ``python -m tests.serving.server_process STATUS_FILE SERVER_ARGUMENTS...``. On SIGUSR1 it writes to STATUS_FILE
the widest batch so far, how many caches are alive and the report; the server itself is untouched. With FAIL_AT_CALL in
the environment, the CPU kernel raises at that call, once.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    status_file: Path
    log: Path

    def status(self) -> dict[str, Any]:
        """``widest_batch``, ``live_caches`` of quantized rows, ``calls`` per route."""
        self.status_file.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        for _ in range(300):
            if self.status_file.exists():
                status: dict[str, Any] = json.loads(self.status_file.read_text())
                return status
            time.sleep(0.1)
        raise TimeoutError(f"the server gave no status: {self.log.read_text()[-2000:]}")


@contextmanager
def running_server(model: Path, folder: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """The server of ``model`` on a free port of the loopback, ready for requests, ended on the way out."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    status_file, log = folder / "status.json", folder / "server.log"
    command = [sys.executable, "-m", "tests.serving.server_process", str(status_file)]
    command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith("QSDPA_")} | environment
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        server = Server(f"http://127.0.0.1:{port}", process, status_file, log)
        _wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: Server) -> None:
    for _ in range(600):
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {server.log.read_text()[-2000:]}")


def _make_kernel_fail(at_call: int) -> None:
    from qsdpa_patch.kernels.backends import default_backend_name, load_backend

    backend: Any = load_backend(default_backend_name())
    attend, calls = backend.attend, 0

    def failing_attend(call: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise RuntimeError("the kernel was made to fail")
        return attend(call)

    backend.attend = failing_attend


def _main(status_file: str, arguments: list[str]) -> None:
    import mlx_lm.server
    from mlx_lm.generate import GenerationBatch

    from qsdpa_patch.caches.base import QuantizedCache

    if os.environ.get("FAIL_AT_CALL"):
        _make_kernel_fail(int(os.environ["FAIL_AT_CALL"]))
    widest = 0
    step = GenerationBatch._step

    def counting_step(self: Any) -> Any:
        nonlocal widest
        widest = max(widest, len(self.uids))
        return step(self)

    GenerationBatch._step = counting_step

    def write_status(*_: object) -> None:
        gc.collect()
        patch = sys.modules.get("qsdpa_patch")
        status = {
            "widest_batch": widest,
            "live_caches": sum(isinstance(each, QuantizedCache) for each in gc.get_objects()),
            "calls": patch.report().calls if patch else {},
        }
        partial = Path(f"{status_file}.partial")
        partial.write_text(json.dumps(status))
        partial.replace(status_file)

    signal.signal(signal.SIGUSR1, write_status)
    sys.argv = ["mlx_lm.server", *arguments]
    mlx_lm.server.main()


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
