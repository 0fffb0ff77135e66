"""What is trained, how long and how fast: the numbers of the training, apart from its machinery."""

import math
from dataclasses import dataclass
from typing import Any, Final

from small_model.model import Mode
from vllm_dsv32.tools.tiny_checkpoint import YARN

__all__ = ["CONFIG", "VOCABULARY", "Recipe"]

VOCABULARY: Final = 1152

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": dict(YARN),
    "max_position_embeddings": 163840,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Recipe:
    """A training run; the stages are the report's."""

    steps: tuple[int, int, int] = (40_000, 300, 4_000)
    """Of dense training, of the indexer's warm-up, of sparse training."""
    peak_rates: tuple[float, float, float] = (1e-3, 2e-3, 5e-4)
    """Learning rates that each stage's cosine falls from, to a twentieth."""
    beta2: float = 0.98
    """Of AdamW; steps are of one task each, so a short memory would swing between them."""
    tokens: int = 16_384
    """Of a batch."""
    curriculum: tuple[tuple[float, tuple[int, ...]], ...] = (
        (0.0, (160, 256)),
        (0.1, (256, 512)),
        (0.25, (512, 1024, 2048)),
        (0.5, (1024, 2048, 4096)),
    )
    """From which share of the dense stage on, needle texts of which lengths in tokens."""
    draft_weight: float = 0.1
    """Of the multi-token-prediction layer's loss."""

    def stage(self, step: int) -> tuple[Mode, float]:
        """The stage of a step, and how far in it, 0 to 1."""
        for mode, steps in zip(Mode, self.steps, strict=True):
            if step < steps:
                return mode, step / steps
            step -= steps
        return Mode.SPARSE, 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        mode, share = self.stage(step)
        peak = self.peak_rates[list(Mode).index(mode)]
        return peak * min(1.0, (step + 1) / 200) * (0.05 + 0.475 * (1 + math.cos(math.pi * share)))

    def lengths(self, step: int) -> tuple[int, ...]:
        """Of the needle texts at a step, tokens."""
        mode, share = self.stage(step)
        if mode is not Mode.DENSE:
            share = 1.0
        return next(lengths for begin, lengths in reversed(self.curriculum) if share >= begin)
