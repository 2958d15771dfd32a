"""DeepSeek v3 and the models that follow its absorbed MLA: one latent per token serves as keys and values.

DeepSeek v3.2 and its kin also have an indexer, whose cache picks the tokens to attend to: it is read whole at every
step by the model's own code, so it stays as it is. The rows that it picks are gathered packed
(:mod:`qsdpa_patch.row_gathering`). DeepSeek v4.1 keeps windows, compressed groups and index keys in a
cache of its own, and rounds the windows itself: nothing of it is quantized.
"""

from qsdpa_patch.adapter import Adapter, Layer, LayerPlan

_INDEXED = ("deepseek_v32", "glm_moe_dsa")
_LATENT = (
    "deepseek_v3",
    *_INDEXED,
    "glm4_moe_lite",
    "kimi_k25",
    "kimi_k3",
    "kimi_linear",
    "kimi_vl",
    "longcat_flash",
    "longcat_flash_ngram",
    "bailing_hybrid",
    "bailing_moe_v3",
)


def _plan_layer(layer: Layer) -> LayerPlan:
    if layer.model_type in _INDEXED and layer.part == 1:
        return LayerPlan(kind="indexer", keep="the indexer's keys are read by the model's own code")
    return LayerPlan(latent=layer.model_type in _LATENT)


ADAPTER = Adapter(
    name="deepseek",
    model_types=(*_LATENT, "deepseek", "deepseek_v2", "deepseek_v41"),
    latent=_LATENT,
    plan_layer=_plan_layer,
)
