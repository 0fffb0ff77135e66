"""The tensors of a DeepSeek-V3.2 checkpoint as DeepSeek publishes it: names, shapes, roles, storage.

For the published configuration this yields the published checkpoint's 92,425 tensors and 685,396,921,376
elements; a test counts them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Role", "TensorSpec", "checkpoint_tensors", "is_moe_layer"]

Role = Literal[
    "attention",
    "correction_bias",
    "eh_proj",
    "embedding",
    "gate",
    "index_k_bias",
    "indexer",
    "lm_head",
    "mlp",
    "norm",
    "o_proj",
]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor before any quantisation."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def is_fp8(self) -> bool:
        """Whether the published checkpoint holds it in fp8 blocks, with a ``..._scale_inv`` beside it."""
        # The indexer's weights_proj is the one projection of attention and MLP that stays in bf16.
        quantised = self.role in ("attention", "o_proj", "indexer", "mlp")
        return quantised and not self.name.endswith("weights_proj.weight")

    @property
    def is_fp32(self) -> bool:
        """Whether the published checkpoint holds it in float32: all norms, biases included."""
        return self.role in ("norm", "index_k_bias", "correction_bias")


def is_moe_layer(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether decoder layer ``layer`` has experts; the MTP layers count on after the last layer."""
    return layer >= int(config["first_k_dense_replace"])


def checkpoint_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """Yield every tensor of the checkpoint that ``config`` describes.

    Args:
        config: what ``config.json`` says, with the published key names.
    """
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    yield TensorSpec("model.embed_tokens.weight", (vocab, hidden), "embedding")
    yield TensorSpec("model.norm.weight", (hidden,), "norm")
    yield TensorSpec("lm_head.weight", (vocab, hidden), "lm_head")
    num_layers = config["num_hidden_layers"]
    for layer in range(num_layers):
        yield from _decoder_layer(config, layer)
    for layer in range(num_layers, num_layers + config["num_nextn_predict_layers"]):
        yield from _decoder_layer(config, layer)
        yield from _mtp_extras(config, f"model.layers.{layer}")


def _decoder_layer(config: Mapping[str, Any], layer: int) -> Iterator[TensorSpec]:
    prefix, hidden = f"model.layers.{layer}", config["hidden_size"]
    yield TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,), "norm")
    yield TensorSpec(f"{prefix}.post_attention_layernorm.weight", (hidden,), "norm")
    yield from _attention(config, f"{prefix}.self_attn")
    yield from _indexer(config, f"{prefix}.self_attn.indexer")
    if is_moe_layer(config, layer):
        yield from _moe(config, f"{prefix}.mlp")
    else:
        yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])


def _attention(config: Mapping[str, Any], prefix: str) -> Iterator[TensorSpec]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield TensorSpec(f"{prefix}.q_a_proj.weight", (q_rank, hidden), "attention")
    yield TensorSpec(f"{prefix}.q_a_layernorm.weight", (q_rank,), "norm")
    yield TensorSpec(f"{prefix}.q_b_proj.weight", (heads * (nope + rope), q_rank), "attention")
    yield TensorSpec(f"{prefix}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden), "attention")
    yield TensorSpec(f"{prefix}.kv_a_layernorm.weight", (kv_rank,), "norm")
    yield TensorSpec(f"{prefix}.kv_b_proj.weight", (heads * (nope + v), kv_rank), "attention")
    yield TensorSpec(f"{prefix}.o_proj.weight", (hidden, heads * v), "o_proj")


def _indexer(config: Mapping[str, Any], prefix: str) -> Iterator[TensorSpec]:
    hidden, heads, width = config["hidden_size"], config["index_n_heads"], config["index_head_dim"]
    yield TensorSpec(f"{prefix}.wq_b.weight", (heads * width, config["q_lora_rank"]), "indexer")
    yield TensorSpec(f"{prefix}.wk.weight", (width, hidden), "indexer")
    yield TensorSpec(f"{prefix}.k_norm.weight", (width,), "norm")
    yield TensorSpec(f"{prefix}.k_norm.bias", (width,), "index_k_bias")
    yield TensorSpec(f"{prefix}.weights_proj.weight", (heads, hidden), "indexer")


def _moe(config: Mapping[str, Any], prefix: str) -> Iterator[TensorSpec]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["n_routed_experts"]
    yield TensorSpec(f"{prefix}.gate.weight", (experts, hidden), "gate")
    yield TensorSpec(f"{prefix}.gate.e_score_correction_bias", (experts,), "correction_bias")
    for expert in range(experts):
        yield from _mlp(f"{prefix}.experts.{expert}", hidden, width)
    # The shared experts are stored as one MLP of their joint width.
    yield from _mlp(f"{prefix}.shared_experts", hidden, width * config["n_shared_experts"])


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.gate_proj.weight", (width, hidden), "mlp")
    yield TensorSpec(f"{prefix}.up_proj.weight", (width, hidden), "mlp")
    yield TensorSpec(f"{prefix}.down_proj.weight", (hidden, width), "mlp")


def _mtp_extras(config: Mapping[str, Any], prefix: str) -> Iterator[TensorSpec]:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    yield TensorSpec(f"{prefix}.embed_tokens.weight", (vocab, hidden), "embedding")
    yield TensorSpec(f"{prefix}.enorm.weight", (hidden,), "norm")
    yield TensorSpec(f"{prefix}.hnorm.weight", (hidden,), "norm")
    yield TensorSpec(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), "eh_proj")
    yield TensorSpec(f"{prefix}.shared_head.norm.weight", (hidden,), "norm")
    yield TensorSpec(f"{prefix}.shared_head.head.weight", (vocab, hidden), "lm_head")
