"""The one exception of the emulator."""

__all__ = ["MetalError"]


class MetalError(RuntimeError):
    """A kernel that does not compile, breaks a rule of Metal's, or does at run time what a GPU leaves undefined."""
