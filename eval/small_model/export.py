"""From the trained state to a checkpoint folder in DeepSeek's format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from small_model.model import SmallModel
from vllm_dsv32.checkpoint_tensors import checkpoint_tensors
from vllm_dsv32.tools.tiny_tokenizer import write_tokenizer_config

__all__ = ["export", "published_tensors"]

_SHARD_NBYTES = 12 << 20


def published_tensors(model: SmallModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the checkpoint's names, bfloat16 where the published ones are not float32."""
    found = dict(_renamed(model.state_dict(), model.config))
    tensors = {}
    for spec in checkpoint_tensors(model.config):
        tensor = found.pop(spec.name)
        assert tuple(tensor.shape) == spec.shape, spec.name
        tensors[spec.name] = tensor.to(torch.float32 if spec.is_fp32 else torch.bfloat16).contiguous().cpu()
    assert not found, sorted(found)
    return tensors


def _renamed(state: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        if name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj"):
            prefix, _, projection = name.rpartition(".")
            for expert, weight in enumerate(tensor):
                yield f"{prefix}.experts.{expert}.{projection}.weight", weight
        else:
            yield name, tensor
    draft = f"model.layers.{config['num_hidden_layers']}"
    yield f"{draft}.embed_tokens.weight", state["model.embed_tokens.weight"].clone()
    yield f"{draft}.shared_head.head.weight", state["lm_head.weight"].clone()


def export(model: SmallModel, tokenizer: Tokenizer, path: Path) -> None:
    """Write the checkpoint: config.json, the weights in shards, the tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in published_tensors(model).items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > _SHARD_NBYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    _write(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write(path / "config.json", model.config)
    tokenizer.save(str(path / "tokenizer.json"))
    write_tokenizer_config(path)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
