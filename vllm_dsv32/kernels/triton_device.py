"""The GPU that tiles are chosen for, and arithmetic of launches: both once a launch, so both are quick."""

from functools import cache

import torch

__all__ = ["capability_of", "ceil_div", "num_multiprocessors"]

_INTERPRETER_MULTIPROCESSORS = 2


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None for Triton's interpreter, which takes tensors of the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def ceil_div(a: int, b: int) -> int:
    """As Triton's ``cdiv``, which takes microseconds on the host."""
    return -(-a // b)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """As many programs run at once, or a multiple."""
    if device.type != "cuda":
        return _INTERPRETER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
