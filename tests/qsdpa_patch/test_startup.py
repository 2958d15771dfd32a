"""The start-up hook: ``QSDPA_PATCH`` without a change of code. Needs the package installed, by wheel or editable."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("_qsdpa_patch_startup") is None, reason="the package is not installed, so no .pth file is in place"
)

STATE = "import mlx_lm.generate, sys; q = sys.modules.get('qsdpa_patch'); print(bool(q) and q.is_enabled())"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("QSDPA_")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)


def test_on() -> None:
    done = run(STATE, QSDPA_PATCH="1", QSDPA_KEY_BITS="8")
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_models_imported_after_the_hook_are_patched_once() -> None:
    code = (
        "import mlx_lm, sys; from mlx_lm.models import llama; first = sys.modules['mlx_lm']; import mlx_lm.server;"
        "print(hasattr(llama.scaled_dot_product_attention, '__wrapped__'), sys.modules['mlx_lm'] is first is mlx_lm)"
    )
    assert run(code, QSDPA_PATCH="1").stdout == "True True\n"


@pytest.mark.parametrize("environment", [{}, {"QSDPA_PATCH": "0"}, {"QSDPA_PATCH": ""}, {"QSDPA_PATCH": "off"}])
def test_off(environment: dict[str, str]) -> None:
    done = run(STATE, **environment)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_nothing_heavy_is_imported_before_mlx_lm() -> None:
    code = "import sys; print([m for m in ('qsdpa_patch', 'wrapt', 'mlx', 'mlx.core', 'asyncio') if m in sys.modules])"
    assert run(code, QSDPA_PATCH="1").stdout == "[]\n"
    assert run("import sys; print('_qsdpa_patch_startup' in sys.modules)").stdout == "False\n"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"QSDPA_PATCH": "banana"}, "QSDPA_PATCH='banana' is not a switch: set it to 1 or 0"),
        ({"QSDPA_PATCH": "1", "QSDPA_KERNELS": "opencl"}, "QSDPA_KERNELS='opencl' is unknown"),
        ({"QSDPA_PATCH": "1", "QSDPA_LOG": "loud"}, "QSDPA_LOG='loud' is unknown"),
    ],
)
def test_a_bad_value_gives_one_line_and_the_interpreter_goes_on(environment: dict[str, str], message: str) -> None:
    done = run(STATE, **environment)
    assert done.stdout == "False\n"
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("qsdpa_patch: not enabled: ")
    assert message in done.stderr
