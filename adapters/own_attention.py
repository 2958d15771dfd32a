"""Models that compute attention in their own code, and so read a quantized cache as dequantized arrays."""

from qsdpa_patch.adapter import Adapter

ADAPTER = Adapter(
    name="own_attention",
    model_types=("gear", "olmo", "phi3small", "plamo2"),
    own_attention={
        "gear": "where scores are soft-capped, in the model's own code",
        "olmo": "scores and softmax are in the model's own code",
        "phi3small": "every other layer computes block-sparse attention in the model's own code",
        "plamo2": "the model calls mx.fast.scaled_dot_product_attention itself",
    },
)
