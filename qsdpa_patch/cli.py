"""The command line ``qsdpa``: one sub-command a module, imported when it is run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

_COMMANDS = {
    "doctor": ("qsdpa_patch.doctor.command", "say what is installed, what would be patched, and what is wrong"),
    "demo": ("qsdpa_patch.demo.command", "generate with a small real model over quantized caches, and compare"),
    "verify": (
        "qsdpa_patch.verify.command",
        "compare a model over quantized caches with itself over an unquantized one",
    ),
    "bench": ("qsdpa_patch.bench.command", "time attention side by side with what mlx-lm does without the patch"),
}
"""``name -> (module with add_arguments(parser) and run(args) -> exit status, help)``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="qsdpa", description="Fused attention over quantized KV caches for mlx-lm.")
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, text) in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv[:1]:
            import_module(module).add_arguments(subparser)
    args = parser.parse_args(argv)
    if args.version:
        from qsdpa_patch import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        status: int = import_module(_COMMANDS[args.command][0]).run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, head say, has seen enough
        sys.stderr.close()
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
