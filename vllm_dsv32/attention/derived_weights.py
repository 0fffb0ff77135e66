"""Weights that are made of loaded ones."""

import torch

__all__ = ["set_buffer"]


def set_buffer(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Keep a tensor with a module; in place on a reload, so that captured graphs keep reading the right memory."""
    if name in module._buffers:
        module.get_buffer(name).copy_(value)
    else:
        module.register_buffer(name, value, persistent=False)
