"""From DeepSeek's checkpoint to the model's parameters, with nothing lost and nothing made up.

A table maps each tensor that this rank needs to the parameter (or the part of one) that takes it. It is
derived from the parameters that exist, so it knows what pipeline and expert parallelism left out, and what
a quantised layer adds (``weight_scale_inv`` beside every fp8 ``weight``).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import get_pp_missing_layer_names

from vllm_dsv32.errors import CheckpointError
from vllm_dsv32.model.tensor_shapes import TensorShapes

__all__ = ["FUSED", "load_checkpoint"]

FUSED = {
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Modules that hold several of the checkpoint's, in the order of their shards; vLLM's quantisation asks, too."""

_EXPERT_PARAMETER = re.compile(r"(?P<experts>.*\.experts)(?P<inner>\..+)?\.(?P<half>w13|w2)_(?P<kind>.+)")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class _Target:
    """Where a tensor of the checkpoint goes."""

    parameter: str
    shard: int | str | None = None
    """Part of a fused parameter; for experts one of w1, w2, w3."""
    expert: int | None = None
    """Physical id; several targets of one tensor are its redundant copies."""


def load_checkpoint(
    model: torch.nn.Module,
    config: Any,
    weights: Iterable[tuple[str, torch.Tensor]],
    checkpoint_name: Callable[[str], str],
    belongs_here: Callable[[int | None], bool],
    partial: bool = False,
) -> set[str]:
    """Load the tensors that belong to ``model``.

    Args:
        model: main or draft model; its parameters define what is needed.
        config: the checkpoint's.
        weights: all tensors of the checkpoint, in any order.
        checkpoint_name: from a parameter's name to the checkpoint's, fused parts and experts aside.
        belongs_here: whether the tensors of a layer (None: of no layer) are this model's; others are
            skipped.
        partial: whether tensors may be missing, as when weights are updated one by one.

    Returns:
        The names of the parameters that were loaded.

    Raises:
        CheckpointError: a tensor of ``model`` is missing, unexpected or misshapen.
    """
    targets = _targets(model, config, checkpoint_name)
    shapes = TensorShapes(config)
    parameters = dict(model.named_parameters())
    elsewhere = _Elsewhere(model, targets, config.n_routed_experts or 0)
    seen: set[str] = set()
    loaded: set[str] = set()
    for name, tensor in weights:
        if name.endswith("rotary_emb.inv_freq") or not belongs_here(_layer_index(name)):
            continue
        if name not in targets:
            if name in elsewhere:
                continue
            raise CheckpointError(
                f"unexpected tensor {name} {tuple(tensor.shape)}: the model of config.json has no such "
                "parameter. Check quantization_config and the numbers of layers and experts."
            )
        shapes.check(name, tensor)
        for target in targets[name]:
            _load(parameters[target.parameter], target, tensor)
            loaded.add(target.parameter)
        seen.add(name)
    missing = sorted(targets.keys() - seen)
    if missing and not partial:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors that the model of config.json needs: "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"
        )
    return loaded


def _load(parameter: torch.nn.Parameter, target: _Target, tensor: torch.Tensor) -> None:
    loader: Callable[..., None] = getattr(parameter, "weight_loader", default_weight_loader)
    if target.expert is not None:
        loader(parameter, tensor, target.parameter, shard_id=target.shard, expert_id=target.expert)
    elif target.shard is not None:
        loader(parameter, tensor, target.shard)
    else:
        loader(parameter, tensor)


def _targets(
    model: torch.nn.Module, config: Any, checkpoint_name: Callable[[str], str]
) -> dict[str, list[_Target]]:
    """Every tensor that this rank needs, by its name in the checkpoint."""
    redundant = getattr(model, "num_redundant_experts", 0)
    expert_mapping = fused_moe_make_expert_params_mapping(
        model, "gate_proj", "down_proj", "up_proj", config.n_routed_experts or 0, redundant
    )
    targets: dict[str, list[_Target]] = {}
    for parameter, _ in model.named_parameters():
        expert = _EXPERT_PARAMETER.fullmatch(parameter)
        pairs = (
            _plain_targets(parameter)
            if expert is None
            else _expert_targets(model, parameter, expert, expert_mapping)
        )
        for name, target in pairs:
            targets.setdefault(checkpoint_name(name), []).append(target)
    return targets


def _plain_targets(parameter: str) -> Iterator[tuple[str, _Target]]:
    for fused, parts in FUSED.items():
        if f".{fused}." in parameter:
            for shard, part in enumerate(parts):
                yield parameter.replace(f".{fused}.", f".{part}."), _Target(parameter, shard)
            return
    yield parameter, _Target(parameter)


def _expert_targets(
    model: torch.nn.Module,
    parameter: str,
    match: re.Match[str],
    expert_mapping: list[tuple[str, str, int, str]],
) -> Iterator[tuple[str, _Target]]:
    # expert_map: global physical id to local id, -1 for experts of other ranks; None: all are here.
    expert_map: Any = model.get_submodule(parameter.rpartition(".")[0]).expert_map
    parent = match["experts"].removesuffix("experts")
    for fused, part, expert, shard in expert_mapping:
        is_half = fused.endswith(f"{match['half']}_")
        if is_half and (expert_map is None or expert_map[expert] >= 0):
            yield f"{parent}{part}{match['kind']}", _Target(parameter, shard, expert)


def _layer_index(name: str) -> int | None:
    match = _LAYER.match(name)
    return None if match is None else int(match[1])


class _Elsewhere:
    """Knows the tensors that another pipeline stage or another expert-parallel rank takes."""

    def __init__(self, model: torch.nn.Module, targets: Iterable[str], num_experts: int) -> None:
        self._missing_layers = tuple(get_pp_missing_layer_names(model))
        self._expert_tensors = {_EXPERT.sub(".experts.*.", name) for name in targets if ".experts." in name}
        self._num_experts = num_experts

    def __contains__(self, name: str) -> bool:
        if name.startswith(self._missing_layers):
            return True
        expert = _EXPERT.search(name)
        # Every rank has some expert of each layer, so the same tensor of another one is known here.
        return (
            expert is not None
            and int(expert[1]) < self._num_experts
            and _EXPERT.sub(".experts.*.", name) in self._expert_tensors
        )
