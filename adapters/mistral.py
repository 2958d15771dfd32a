"""Mistral: dense (which mlx-lm runs as Llama), Ministral, Mixtral, and Mistral 4 with its MLA latent."""

from qsdpa_patch.adapter import Adapter

ADAPTER = Adapter(
    name="mistral",
    model_types=("mistral", "mistral3", "ministral3", "mixtral", "pixtral", "mistral4"),
    latent=("mistral4",),
)
