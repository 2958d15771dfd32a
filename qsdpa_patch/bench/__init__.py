"""``qsdpa bench``: every way to attend over a KV cache, timed side by side in one process."""
