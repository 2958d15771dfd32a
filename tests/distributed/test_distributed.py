"""mlx-lm's tensor and pipeline parallelism over quantized caches: two processes give what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this build of MLX has no ring backend")


def results(command: list[str]) -> list[dict[str, Any]]:
    """What each process of ``command`` printed, by rank."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("QSDPA_", "MLX_RANK"))} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if '"tokens"' in line]
    return sorted(found, key=lambda result: int(result["rank"]))


def worker(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.distributed.worker", *arguments]


def launched(*arguments: str) -> list[str]:
    """``worker`` in two processes, over the ring backend on free ports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    return [*launch, "--hosts", "127.0.0.1", "-n", "2", "--backend", "ring", "-p", str(port), "--", *worker(*arguments)]


@pytest.mark.parametrize(
    ("architecture", "mode", "cache"),
    [
        ("llama", "tensor", "QuantizedKVCache"),
        ("qwen2", "pipeline", "QuantizedKVCache"),
        ("deepseek_v3", "pipeline", "QuantizedLatentCache"),
    ],
)
def test_two_processes_give_what_one_gives(architecture: str, mode: str, cache: str) -> None:
    (alone,) = results(worker(architecture, "single", "8"))
    together = results(launched(architecture, mode, "8"))
    assert [result["rank"] for result in together] == [0, 1]
    assert all(result["tokens"] == alone["tokens"] for result in together)
    assert all(cache in result["caches"] for result in together)
    assert len(set(alone["tokens"])) > 3, "the model says the same over and over"
    quantized = sum(alone["calls"][route] for route in ("fused", "prefill", "ops"))
    shares = [sum(result["calls"][route] for route in ("fused", "prefill", "ops")) for result in together]
    assert sum(shares) == (2 * quantized if mode == "tensor" else quantized)
