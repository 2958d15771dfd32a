"""``qsdpa doctor``: what is installed, what would be patched, which kernels serve, and what is wrong."""
