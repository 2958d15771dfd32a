"""Gemma: 2 with its soft cap, 3 with sliding windows, 3n and 4 with sliding windows and shared keys and values.

A layer that shares another's keys and values has no cache of its own: it is handed what the other's cache gave, a
``QuantizedTensor``, and takes the same routes.
"""

from qsdpa_patch.adapter import Adapter

ADAPTER = Adapter(
    name="gemma",
    model_types=("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text"),
    own_attention={"gemma2": "scores are soft-capped (tanh) between product and softmax, in the model's own code"},
)
