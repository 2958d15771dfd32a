"""MiniMax: M3 has sparse layers with a second cache, whose keys pick the blocks to attend to."""

from qsdpa_patch.adapter import Adapter, Layer, LayerPlan


def _plan_layer(layer: Layer) -> LayerPlan:
    if layer.model_type == "minimax_m3_vl" and layer.part == 1:
        return LayerPlan(kind="indexer", keep="the indexer's keys are read by the model's own code")
    return LayerPlan()


ADAPTER = Adapter(name="minimax", model_types=("minimax", "minimax_m3_vl"), plan_layer=_plan_layer)
