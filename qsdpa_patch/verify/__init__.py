"""``qsdpa verify``: a model of the user's over quantized caches, measured against its unquantized one."""
