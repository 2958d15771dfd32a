"""Models that compute attention in their own code, and so read a quantized cache as dequantized arrays."""

from qsdpa_patch.adapter import Adapter

ADAPTER = Adapter(
    name="own_attention",
    model_types=("plamo2", "olmo", "gear"),
    own_attention={
        "plamo2": "the model calls mx.fast.scaled_dot_product_attention itself",
        "olmo": "scores and softmax are in the model's own code",
        "gear": "where scores are soft-capped, in the model's own code",
    },
)
