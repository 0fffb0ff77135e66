"""Random-weight DeepSeek-V3.2 checkpoints of a few MB, in the published format.

They serve to test everything that does not need the model's knowledge: loading, shapes, kernels, sharding,
serving. ``write_checkpoint`` makes a folder that vLLM and transformers load like the real one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file

from vllm_dsv32.checkpoint_tensors import Role, TensorSpec, checkpoint_tensors
from vllm_dsv32.errors import CheckpointError, ConfigError
from vllm_dsv32.tools.fp8_blocks import BLOCK_SIZE, dequantize_blocks, quantize_blocks
from vllm_dsv32.tools.tiny_tokenizer import tokenizer_size, write_tokenizer

__all__ = [
    "ModelSizes",
    "TinyCheckpointOptions",
    "WeightScales",
    "make_config",
    "make_weights",
    "write_checkpoint",
]

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}

YARN: Final[Mapping[str, Any]] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
"""``rope_scaling`` of the published configuration."""

FP8_QUANTIZATION: Final[Mapping[str, Any]] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
}
"""``quantization_config`` of the published configuration."""

WeightFormat = Literal["plain", "fp8", "fp8_dequantized"]


@dataclass(frozen=True, kw_only=True)
class WeightScales:
    """Standard deviations, per role of a tensor.

    A matrix of role ``r`` is drawn from N(0, r**2 / fan_in). The attention projections default to 0.5: with
    more, random attention is chaotic, and quantising the index alone changes many tokens past top-k, so that
    a comparison could not tell a right implementation from a wrong one.
    """

    attention: float = 0.5
    """q_a, q_b, kv_a and kv_b projections."""
    o_proj: float = 1.0
    indexer: float = 1.0
    mlp: float = 1.0
    gate: float = 1.0
    eh_proj: float = 1.0
    lm_head: float = 1.0
    embedding: float = 1.0
    """Not divided by a fan-in."""
    norm: float = 0.1
    """Spread of norm weights around 1."""
    index_k_bias: float = 0.3
    """Bias of the LayerNorm on index keys; a forgotten one shows in the selection."""
    correction_bias: float = 0.2
    """Experts' ``e_score_correction_bias``; about the spread of the scores, so that it decides choices."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The model's sizes; each field is the key of ``config.json`` of the same name.

    The widths that kernels are specialised on are the published ones (kv_lora 512, rope 64, nope and v 128,
    index head 128). Everything else is small, ``index_topk`` too, so that a prompt of a hundred tokens
    already attends sparsely.
    """

    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 3
    first_k_dense_replace: int = 1
    """Leading layers with a dense MLP; ``dense_only`` overrides it."""
    num_attention_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 16
    index_head_dim: int = 128
    index_topk: int = 64
    moe_intermediate_size: int = 128
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_group: int = 4
    topk_group: int = 2
    n_shared_experts: int = 1
    num_nextn_predict_layers: int = 1
    """MTP layers, 0 for none."""


@dataclass(frozen=True, kw_only=True)
class TinyCheckpointOptions(ModelSizes):
    """What to write: the model's sizes, and how its weights are drawn and stored."""

    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of everything the published checkpoint holds in bfloat16."""
    weight_format: WeightFormat = "plain"
    """``fp8``: the published block format. ``fp8_dequantized``: the same numbers, stored in ``dtype``."""
    yarn: bool = True
    """Whether to scale RoPE as published. Without it the model has its 4096 original positions."""
    dense_only: bool = False
    """No experts in any layer, MTP included: for comparisons that a flipped expert would blur."""
    weight_scales: WeightScales = field(default_factory=WeightScales)
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Applied to the configuration last; shapes follow it. A value of None removes the key."""


def make_config(options: TinyCheckpointOptions) -> dict[str, Any]:
    """Return ``config.json`` for ``options``, with every key of the published one.

    Raises:
        ConfigError: the sizes do not describe a DeepSeek-V3.2 model.
    """
    config: dict[str, Any] = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 163840 if options.yarn else 4096,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_scaling": dict(YARN) if options.yarn else None,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": options.dtype,
        "use_cache": True,
        "vocab_size": tokenizer_size(),
    }
    config |= {size.name: getattr(options, size.name) for size in fields(ModelSizes)}
    if options.dense_only:
        config["first_k_dense_replace"] = options.num_hidden_layers + options.num_nextn_predict_layers
    if options.weight_format == "fp8":
        config["quantization_config"] = dict(FP8_QUANTIZATION)
    config |= options.config_overrides
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config = {key: value for key, value in config.items() if value is not None}
    _check_config(config)
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for sizes that no implementation could load."""
    missing = {"vocab_size", *(size.name for size in fields(ModelSizes))} - set(config)
    if missing:
        raise ConfigError(
            f"config_overrides may not remove {', '.join(sorted(missing))}: the shapes follow from it"
        )
    for size in fields(ModelSizes):
        least = 0 if size.name in ("first_k_dense_replace", "num_nextn_predict_layers") else 1
        value = config[size.name]
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{size.name} must be a whole number of at least {least}, got {value!r}")
    experts, groups = config["n_routed_experts"], config["n_group"]
    if experts % groups:
        raise ConfigError(
            f"n_routed_experts must be a multiple of n_group, got {experts} experts in {groups} groups; "
            "change one of the two"
        )
    group_size = experts // groups
    if group_size < 2:
        raise ConfigError(
            f"a group needs at least 2 experts, its score being the sum of its top two, got {group_size}; "
            "lower n_group or raise n_routed_experts"
        )
    reachable = config["topk_group"] * group_size
    if not 1 <= config["num_experts_per_tok"] <= reachable:
        raise ConfigError(
            f"num_experts_per_tok must lie in 1..{reachable} (topk_group x experts per group), got "
            f"{config['num_experts_per_tok']}; lower it or raise topk_group"
        )
    if config["topk_group"] > groups:
        raise ConfigError(f"topk_group must be at most n_group = {groups}, got {config['topk_group']}; lower it")
    if config["qk_rope_head_dim"] > config["index_head_dim"] or config["qk_rope_head_dim"] % 2:
        raise ConfigError(
            f"qk_rope_head_dim must be even and at most index_head_dim = {config['index_head_dim']}, got "
            f"{config['qk_rope_head_dim']}; the indexer rotates the first qk_rope_head_dim of its dimensions"
        )
    if config["vocab_size"] < tokenizer_size():
        raise ConfigError(
            f"vocab_size must hold the tokenizer's {tokenizer_size()} tokens, got {config['vocab_size']}; raise it"
        )


def make_weights(options: TinyCheckpointOptions) -> dict[str, torch.Tensor]:
    """Draw the weights of ``options``.

    Each tensor depends on the seed, its name and its shape alone. So a checkpoint with and one without MTP,
    YaRN or fp8 agree in everything they have in common.

    Returns:
        Name to contiguous CPU tensor: projections in ``options.dtype``, norms and biases in float32. With
        ``weight_format="fp8"`` the projections are float8_e4m3fn ``[rows, cols]``, each with a float32
        ``<name>_scale_inv`` ``[ceil(rows / 128), ceil(cols / 128)]`` beside it.

    Raises:
        ConfigError: as :func:`make_config`.
    """
    dtype = DTYPES[options.dtype]
    weights: dict[str, torch.Tensor] = {}
    for spec in checkpoint_tensors(make_config(options)):
        values = _draw(spec, options)
        if spec.is_fp32:
            weights[spec.name] = values
        elif spec.is_fp8 and options.weight_format != "plain":
            quantised, scale = quantize_blocks(values)
            if options.weight_format == "fp8":
                weights[spec.name], weights[f"{spec.name}_scale_inv"] = quantised, scale
            else:
                weights[spec.name] = dequantize_blocks(quantised, scale).to(dtype)
        else:
            weights[spec.name] = values.to(dtype)
    return weights


def _draw(spec: TensorSpec, options: TinyCheckpointOptions) -> torch.Tensor:
    """Return the float32 values of one tensor."""
    # The published MTP layer repeats the model's own embedding and head.
    shared: dict[Role, str] = {"embedding": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    name = shared.get(spec.role, spec.name)
    digest = hashlib.sha256(f"{options.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.randn(spec.shape, generator=generator) * getattr(options.weight_scales, spec.role)
    if spec.role == "norm":
        return 1 + values
    if spec.role in ("embedding", "index_k_bias", "correction_bias"):
        return values
    fan_in = spec.shape[-1]
    return values / fan_in**0.5


def write_checkpoint(path: str | Path, options: TinyCheckpointOptions, *, overwrite: bool = False) -> Path:
    """Write a checkpoint folder.

    Args:
        path: the folder, made if it is not there.
        options: what to write.
        overwrite: replace a checkpoint that already lies at ``path``.

    Returns:
        ``path``, which holds config.json, generation_config.json, model.safetensors, tokenizer.json and
        tokenizer_config.json.

    Raises:
        ConfigError: as :func:`make_config`.
        CheckpointError: ``path`` already holds a checkpoint and ``overwrite`` is false.
    """
    folder = Path(path)
    config = make_config(options)
    if not overwrite and (folder / "config.json").exists():
        raise CheckpointError(
            f"expected a new or empty folder, but {folder} already holds a checkpoint; "
            "name another one, or ask to overwrite it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(make_weights(options), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    # The configuration comes last: a folder without it is not taken for a checkpoint.
    _write_json(folder / "config.json", config)
    return folder


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
