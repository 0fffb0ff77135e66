"""What a checkpoint's configuration and vLLM's settings say, checked once and put into plain types.

Nothing of a model's shape is a constant elsewhere: it comes from here, and here from the checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_dsv32.errors import ConfigError
from vllm_dsv32.kernels.dispatch import Problem
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.layout import FP8_DS_MLA

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "ModelDims",
    "fill_defaults",
    "kernel_overrides",
    "kernel_problem",
    "normalise_kv_cache_dtype",
    "plugin_options",
    "shared_selection_from",
    "verify_vllm_config",
]

_OPTIONS_KEY = "vllm_dsv32"
_OPTIONS = ("kernels", "shared_selection_from")
SHARED_SELECTION_FROM = 1 << 26
"""8192 tokens at a context of 8192. Of these the later half took 0.63 ms a layer on one H200 (eval/kernels.py).
What the gathering takes was not measured: by the rate of NVLink 0.3 ms."""
_ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_FP8_NAMES = ("fp8", "fp8_e4m3", FP8_DS_MLA)


@dataclass(frozen=True)
class ModelDims:
    """The shape of one attention layer, from the checkpoint's configuration."""

    hidden_size: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    num_index_heads: int
    index_head_dim: int
    topk: int
    rms_norm_eps: float
    max_position: int
    softmax_scale: float
    """``(nope + rope)^-0.5``, times ``mscale^2`` under YaRN."""
    index_rope_layout: RopeLayout
    rope_parameters: Mapping[str, Any]
    """As vLLM's ``get_rope`` takes them."""

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> "ModelDims":
        """Read a ``transformers`` configuration.

        Raises:
            ConfigError: a key is missing, or asks for what the plugin does not serve.
        """
        _refuse_unserved_keys(hf_config)
        rope_parameters = _rope_parameters(hf_config)
        interleaved = getattr(hf_config, "indexer_rope_interleave", False)
        nope_dim, rope_dim = (
            _required(hf_config, "qk_nope_head_dim"),
            _required(hf_config, "qk_rope_head_dim"),
        )
        return cls(
            hidden_size=_required(hf_config, "hidden_size"),
            num_heads=_required(hf_config, "num_attention_heads"),
            q_lora_rank=_required(hf_config, "q_lora_rank"),
            kv_lora_rank=_required(hf_config, "kv_lora_rank"),
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            v_dim=_required(hf_config, "v_head_dim"),
            num_index_heads=_required(hf_config, "index_n_heads"),
            index_head_dim=_required(hf_config, "index_head_dim"),
            topk=_required(hf_config, "index_topk"),
            rms_norm_eps=_required(hf_config, "rms_norm_eps"),
            max_position=_required(hf_config, "max_position_embeddings"),
            softmax_scale=(nope_dim + rope_dim) ** -0.5 * _yarn_mscale(rope_parameters) ** 2,
            index_rope_layout=RopeLayout.INTERLEAVED if interleaved else RopeLayout.NEOX,
            rope_parameters=rope_parameters,
        )


def fill_defaults(hf_config: Any) -> None:
    """Set the routing keys that DeepSeek-V3.2 has by definition where a configuration leaves them out.

    ``transformers`` writes configurations without them; vLLM's experts would then use another router.
    """
    for key, value in _ROUTING.items():
        if getattr(hf_config, key, None) is None:
            setattr(hf_config, key, value)


def verify_vllm_config(vllm_config: "VllmConfig") -> None:
    """Check the settings of a V3.2 engine and fix the KV-cache dtype, before any layer is built.

    Raises:
        ConfigError: a setting is not served; the message says which and why.
    """
    ModelDims.from_hf_config(vllm_config.model_config.hf_config)
    kernel_overrides(vllm_config)
    shared_selection_from(vllm_config)
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name)
        if size > 1:
            raise ConfigError(
                f"{name}={size} is not served: the indexer's top-k would have to be merged over ranks. "
                "Use tensor, pipeline, data or expert parallelism."
            )
    cache_config = vllm_config.cache_config
    # vLLM makes a connector of the offloading size, but only after this check.
    connectors = {
        "--kv-transfer-config": vllm_config.kv_transfer_config,
        "--kv-offloading-size": cache_config.kv_offloading_size,
    }
    for flag, value in connectors.items():
        if value is not None:
            raise ConfigError(
                f"{flag} is not served: connectors that move the cache layer by layer would not be waited for, and "
                "attention would read pages that have not arrived. Drop the flag."
            )
    _refuse_what_only_other_attention_reads(vllm_config)
    backend = vllm_config.attention_config.backend
    if backend is not None:
        raise ConfigError(
            f"--attention-backend {backend.name} is not served: DeepSeek-V3.2 runs on the sparse MLA "
            "backend that vllm-dsv32 brings. Drop the flag."
        )
    if not vllm_config.model_config.use_mla:
        raise ConfigError("VLLM_MLA_DISABLE is set, but DeepSeek-V3.2 is defined on the latent cache. Unset it.")
    dtype = vllm_config.model_config.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"--dtype {dtype} is not served: DeepSeek-V3.2's activations overflow float16. "
            "Use bfloat16, or float32 for comparisons."
        )
    cache_config.cache_dtype = normalise_kv_cache_dtype(cache_config.cache_dtype, dtype)


def normalise_kv_cache_dtype(kv_cache_dtype: str, dtype: torch.dtype) -> str:
    """The cache format behind a value of ``--kv-cache-dtype``: "auto" (the model's dtype) or "fp8_ds_mla".

    Raises:
        ConfigError: there is no cache of that format.
    """
    if kv_cache_dtype in _FP8_NAMES:
        return FP8_DS_MLA
    if kv_cache_dtype == "auto" or (kv_cache_dtype == "bfloat16" and dtype == torch.bfloat16):
        return "auto"
    raise ConfigError(
        f"--kv-cache-dtype {kv_cache_dtype} is not served with --dtype {str(dtype).removeprefix('torch.')}: "
        f"use auto (the model's dtype) or fp8 (stored as {FP8_DS_MLA}, 656 bytes a token)."
    )


def plugin_options(vllm_config: "VllmConfig") -> Mapping[str, Any]:
    """What the user sets of this plugin: ``--additional-config '{"vllm_dsv32": {...}}'``.

    Raises:
        ConfigError: there is no such option.
    """
    additional = vllm_config.additional_config
    options = additional.get(_OPTIONS_KEY, {}) if isinstance(additional, Mapping) else {}
    if not isinstance(options, Mapping) or set(options) - set(_OPTIONS):
        raise ConfigError(
            f'additional_config["{_OPTIONS_KEY}"]: expected a map with the keys {" and ".join(_OPTIONS)} or fewer, '
            f"got {options!r}"
        )
    return options


def kernel_overrides(vllm_config: "VllmConfig") -> Mapping[str, str]:
    """The kernels that the user insists on: ``{"kernels": {operation: name}}`` of the options.

    Raises:
        ConfigError: the option is malformed.
    """
    kernels = plugin_options(vllm_config).get("kernels", {})
    if not isinstance(kernels, Mapping) or not all(isinstance(name, str) for name in kernels.values()):
        raise ConfigError(
            f'additional_config["{_OPTIONS_KEY}"]["kernels"]: expected a map from operation to the name of '
            f"an implementation, got {kernels!r}; `vllm-dsv32 doctor` lists both"
        )
    return kernels


def shared_selection_from(vllm_config: "VllmConfig") -> int | None:
    """Tokens times keys of a prefill from which on tensor-parallel ranks share its selection; None: never.

    Raises:
        ConfigError: the option is malformed.
    """
    number = plugin_options(vllm_config).get("shared_selection_from", SHARED_SELECTION_FROM)
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        raise ConfigError(
            f'additional_config["{_OPTIONS_KEY}"]["shared_selection_from"]: expected a number of tokens times '
            f"keys, or null for never, got {number!r}"
        )
    return number


def kernel_problem(vllm_config: "VllmConfig", kv_cache_dtype: str) -> Problem:
    """What the attention layers of this engine will ask of the kernels, on this rank and device."""
    from vllm.platforms import current_platform

    dims = ModelDims.from_hf_config(vllm_config.model_config.hf_config)
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return Problem(
        device_type=current_platform.device_type,
        capability=None if capability is None else (capability.major, capability.minor),
        dtype=vllm_config.model_config.dtype,
        cache_format=kv_cache_dtype,
        num_heads=dims.num_heads // vllm_config.parallel_config.tensor_parallel_size,
        kv_lora_rank=dims.kv_lora_rank,
        rope_dim=dims.rope_dim,
        num_index_heads=dims.num_index_heads,
        index_head_dim=dims.index_head_dim,
        topk=dims.topk,
    )


def _refuse_what_only_other_attention_reads(vllm_config: "VllmConfig") -> None:
    """Settings of what the caches hold and of who reads them, which would have no effect here."""
    attention = vllm_config.attention_config
    ignored = {
        "--kv-cache-dtype-skip-layers": vllm_config.cache_config.kv_cache_dtype_skip_layers,
        "--attention-config.indexer_kv_dtype": attention.indexer_kv_dtype not in ("auto", "fp8", "fp8_e4m3"),
        "--attention-config.hisparse_config": attention.hisparse_config,
        "--attention-config.backend_per_kind": attention.backend_per_kind,
    }
    for flag, value in ignored.items():
        if value:
            raise ConfigError(
                f"{flag} is not served: all layers have the same caches, index keys are fp8, and the sparse MLA "
                "backend that vllm-dsv32 brings reads them. Drop the flag."
            )


def _required(hf_config: Any, key: str) -> Any:
    value = getattr(hf_config, key, None)
    if value is None:
        raise ConfigError(f"config.json has no {key}, which DeepSeek-V3.2 needs; is this a V3.2 checkpoint?")
    return value


def _refuse_unserved_keys(hf_config: Any) -> None:
    """Keys by which other models of the family leave the indexer or the experts out of some layers."""
    for key, served in (("index_topk_freq", 1), ("index_topk_pattern", None), ("moe_layer_freq", 1)):
        value = getattr(hf_config, key, served)
        if value != served:
            raise ConfigError(f"config.json: {key}={value!r} is not served; DeepSeek-V3.2 has {served!r}")


def _rope_parameters(hf_config: Any) -> dict[str, Any]:
    parameters = dict(_required(hf_config, "rope_parameters"))
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "yarn", "deepseek_yarn"):
        raise ConfigError(f"config.json: rope type {kind!r} is not served; expected none or 'yarn'")
    if kind != "default":
        parameters["rope_type"] = "deepseek_yarn"
    return parameters


def _yarn_mscale(rope_parameters: Mapping[str, Any]) -> float:
    """YaRN's attention temperature, ``0.1 * mscale_all_dim * ln(factor) + 1``."""
    mscale_all_dim = rope_parameters.get("mscale_all_dim") or 0
    if rope_parameters.get("rope_type", "default") == "default" or not mscale_all_dim:
        return 1.0
    factor = rope_parameters["factor"]
    return 1.0 if factor <= 1 else 0.1 * mscale_all_dim * math.log(factor) + 1.0
