"""Qwen 2, 3, 3-next and 3.5.

In the hybrids (3-next, 3.5) the linear-attention layers keep a recurrent state in an ``ArraysCache``, which holds no
keys and values and is left alone; the full layers are quantized.
"""

from qsdpa_patch.adapter import Adapter

ADAPTER = Adapter(
    name="qwen",
    model_types=(
        "qwen",
        "qwen2",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
    ),
)
