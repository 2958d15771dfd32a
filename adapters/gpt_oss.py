"""gpt-oss: attention sinks, which the kernels take, and alternating sliding windows."""

from qsdpa_patch.adapter import Adapter

ADAPTER = Adapter(name="gpt_oss", model_types=("gpt_oss",))
