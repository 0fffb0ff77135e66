"""Checks the shapes of a checkpoint's tensors against its configuration."""

from typing import Any

import torch

from vllm_dsv32.checkpoint_tensors import checkpoint_tensors
from vllm_dsv32.errors import CheckpointError

__all__ = ["TensorShapes"]


class TensorShapes:
    """The shapes that a configuration implies, for tensors on their way to a loader.

    vLLM's loaders narrow what is too large and broadcast what is too small without a word.
    """

    def __init__(self, config: Any) -> None:
        """Args: config: the checkpoint's, from ``transformers``."""
        quantization = getattr(config, "quantization_config", None) or {}
        block = quantization.get("weight_block_size")
        self._shapes: dict[str, tuple[int, ...]] = {}
        # In a format that is neither plain nor fp8 blocks, weights are packed: their shapes are its business.
        if quantization and not (quantization.get("quant_method") == "fp8" and block):
            return
        for spec in checkpoint_tensors({"num_nextn_predict_layers": 0} | config.to_dict()):
            self._shapes[spec.name] = spec.shape
            if block and len(spec.shape) == len(block):
                scale_shape = (-(-extent // size) for extent, size in zip(spec.shape, block, strict=True))
                self._shapes[f"{spec.name}_scale_inv"] = tuple(scale_shape)

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Compare a tensor with the configuration.

        Raises:
            CheckpointError: its shape is another one.
        """
        expected = self._shapes.get(name)
        if expected is not None and tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"misshapen tensor {name}: config.json makes it {expected}, the checkpoint has "
                f"{tuple(tensor.shape)}"
            )
