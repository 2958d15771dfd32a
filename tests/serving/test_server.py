"""``QSDPA_PATCH=1 mlx_lm.server --kv-bits 4``: batching stays on, and every reply is the one that it is alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest

from qsdpa_patch.kernels.backends import default_backend_name, load_backend
from tests.qsdpa_patch.demo.tiny_model import write_tiny_model
from tests.serving.server_process import Server, running_server

pytestmark = pytest.mark.skipif(
    find_spec("_qsdpa_patch_startup") is None, reason="the package is not installed, so no .pth file is in place"
)

CLIENTS = 64
TOKENS = 12
FLAGS = ("--kv-bits", "4", "--temp", "0", "--decode-concurrency", "16", "--prompt-concurrency", "4",
         "--prompt-cache-size", "4", "--log-level", "WARNING")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(model, tmp_path_factory.mktemp("server"), *FLAGS, QSDPA_PATCH="1") as running:
        yield running


def prompts() -> list[str]:
    """Of very different lengths; some share a beginning."""
    draw = random.Random(0)
    words = ["hello", "12", "sea", "light", "stone", "wind"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 40))) + f" {i % 7}" for i in range(CLIENTS)]


async def reply(client: openai.AsyncOpenAI, prompt: str, stop_after: int | None = None) -> str:
    """The streamed text; the client hangs up after ``stop_after`` chunks."""
    stream = await client.chat.completions.create(
        model="default_model", messages=[{"role": "user", "content": prompt}], max_tokens=TOKENS, stream=True,
        temperature=0,
    )  # fmt: skip
    text, chunks = "", 0
    async for chunk in stream:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        chunks += 1
        if stop_after is not None and chunks >= stop_after:
            await stream.close()
            break
    return text


async def one_by_one(server: Server) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        return [await reply(client, prompt) for prompt in prompts()]


async def all_at_once(server: Server, *, cancel_every: int = 0) -> list[str]:
    """Every client at the same moment. The server's listen queue holds 5, so that some have to knock again."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=240, max_retries=8) as client:
        stops = [2 if cancel_every and i % cancel_every == 0 else None for i in range(CLIENTS)]
        replies = (reply(client, prompt, stop) for prompt, stop in zip(prompts(), stops, strict=True))
        return list(await asyncio.gather(*replies))


def test_sixty_four_clients_get_what_each_gets_alone(server: Server) -> None:
    alone = asyncio.run(one_by_one(server))
    assert len(set(alone)) >= 8, "the model says the same whatever it is asked"
    assert server.status()["widest_batch"] == 1
    together = asyncio.run(all_at_once(server))
    assert together == alone
    status = server.status()
    assert status["widest_batch"] >= 8
    assert status["calls"]["ops"] == 0
    assert status["calls"]["stock"] == 0, "everything in the batch is quantized"


def test_cancelled_requests_disturb_no_one_and_leave_nothing(model: Path, tmp_path: Path) -> None:
    """Without the server's store of prompts, which keeps caches by design.

    Caches are counted, not bytes: what the last batch holds until the next comes is some megabytes, more or less by how
    wide it happened to be, with the patch and without it. Both counts are taken after one more request, alone: when the
    server's time slice runs out at the last token of many, it keeps their caches until the next reply.
    """
    flags = [*FLAGS]
    flags[flags.index("--prompt-cache-size") + 1] = "0"
    with running_server(model, tmp_path, *flags, QSDPA_PATCH="1") as running:
        first = asyncio.run(all_at_once(running))
        before = caches_after_one_more(running)
        for _ in range(3):
            cancelled = asyncio.run(all_at_once(running, cancel_every=3))
            assert all(text == wanted for i, (text, wanted) in enumerate(zip(cancelled, first, strict=True)) if i % 3)
        assert caches_after_one_more(running) <= before
        assert asyncio.run(all_at_once(running)) == first


def caches_after_one_more(server: Server) -> int:
    """The live caches after a request that nobody shares the server with."""
    settled_caches(server)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        client.chat.completions.create(
            model="default_model", messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0
        )
    return settled_caches(server)


def settled_caches(server: Server) -> int:
    """The live caches once two looks in a row agree: the last requests may still be on their way out."""
    last, now = -1, int(server.status()["live_caches"])
    while now != last:
        time.sleep(0.5)
        last, now = now, int(server.status()["live_caches"])
    return now


def test_a_format_that_there_is_not_is_said_once_and_the_server_goes_on(model: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--quantized-kv-start", "0"]
    flags[1] = "7"
    with running_server(model, tmp_path, *flags, QSDPA_PATCH="1") as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        for _ in range(2):
            with pytest.raises(openai.APIError):
                client.chat.completions.create(
                    model="default_model", messages=[{"role": "user", "content": "hello"}], max_tokens=4
                )
        assert running.process.poll() is None
        log = running.log.read_text()
        assert log.count("--kv-bits 7 --kv-group-size 64: bits=7 is not supported: affine formats take bits in") == 1


def test_a_kernel_that_fails_in_the_middle_of_a_request_costs_nothing(
    server: Server, model: Path, tmp_path: Path
) -> None:
    available, reason = load_backend(default_backend_name()).is_available()
    if not available:
        pytest.skip(f"there is no kernel that could fail: {reason}")
    wanted = asyncio.run(all_at_once(server))
    with running_server(model, tmp_path, *FLAGS, QSDPA_PATCH="1", FAIL_AT_CALL="101") as running:
        assert asyncio.run(all_at_once(running)) == wanted
        calls = running.status()["calls"]
        assert calls["fused"] >= 100
        assert running.log.read_text().count("the kernel was made to fail") == 1


def test_without_the_patch_requests_are_served_one_by_one(model: Path, tmp_path: Path) -> None:
    """What the patch is there for; should mlx-lm learn to batch here, this says so."""
    with running_server(model, tmp_path, *FLAGS) as running:
        asyncio.run(all_at_once(running))
        assert running.status()["widest_batch"] == 0
