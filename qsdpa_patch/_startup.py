"""``QSDPA_PATCH=1``: enable the patch when mlx-lm is first imported, without a change of code.

Installed beside the package as the top-level module ``_qsdpa_patch_startup``, and imported by ``qsdpa_patch.pth`` at
the start of the interpreter, where the variable is set. It must cost next to nothing and can never break the
interpreter: so it imports nothing but ``sys`` and ``os``, and the package only when ``mlx_lm`` is looked up.
"""

import os
import sys


class _EnableOnImport:
    """A finder that finds nothing; it only notices the first look-up of ``mlx_lm``."""

    done = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == "mlx_lm" and not cls.done:
            cls.done = True  # it stays on the list: taking it off would disturb the loop that is calling it
            _enable()
        return


def _enable() -> None:
    try:
        import qsdpa_patch

        qsdpa_patch.enable()
    except Exception as error:
        print(f"qsdpa_patch: not enabled: {error}", file=sys.stderr)


def _wanted() -> bool:
    value = os.environ.get("QSDPA_PATCH", "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value not in ("", "0", "false", "no", "off"):
        print(f"qsdpa_patch: not enabled: QSDPA_PATCH={value!r} is not a switch: set it to 1 or 0", file=sys.stderr)
    return False


if _wanted() and not any(finder is _EnableOnImport for finder in sys.meta_path):
    sys.meta_path.insert(0, _EnableOnImport)
