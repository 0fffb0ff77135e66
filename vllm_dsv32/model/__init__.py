"""DeepSeek-V3.2 itself, written against vLLM's layers and loaded from DeepSeek's checkpoint."""

from vllm_dsv32.model.deepseek_v32 import Dsv32ForCausalLM
from vllm_dsv32.model.mtp import Dsv32MTP

__all__ = ["Dsv32ForCausalLM", "Dsv32MTP"]
