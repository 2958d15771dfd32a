"""Runs Metal compute kernels on Linux: clang compiles them, a scheduler of fibers executes them lane by lane.

See README.md in this folder for what it checks and what it cannot.
"""

from tests.metal.emulator.compiler import missing_tools
from tests.metal.emulator.errors import MetalError
from tests.metal.emulator.metal_kernel import Emulator
from tests.metal.emulator.worker_process import Cost

__all__ = ["Cost", "Emulator", "MetalError", "missing_tools"]
