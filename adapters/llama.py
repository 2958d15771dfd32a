"""Llama: plain grouped-query attention. The file to copy for a new family.

Llama 4 interleaves full layers with chunked ones (``ChunkedKVCache``); both kinds have a quantized twin, so nothing
needs saying here.
"""

from qsdpa_patch.adapter import Adapter

ADAPTER = Adapter(name="llama", model_types=("llama", "llama4", "llama4_text"))
