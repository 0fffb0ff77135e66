"""What torch's profiler says of the kernels that a call launches: their names, shortened, and their times."""

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["launches_of", "short_name"]


def launches_of(call: Callable[[], object]) -> list[tuple[str, float]]:
    """Kernels, fills and copies in the order of their start, with microseconds on the GPU; without one, none."""
    if not torch.cuda.is_available():
        call()
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(short_name(event.name), event.time_range.elapsed_us()) for event in events]


def short_name(name: str) -> str:
    """A kernel's own name, without its type, namespaces and arguments; of CUTLASS's launcher, what it runs."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", name).removeprefix("void ")
    own, arguments = re.match(r"([^<(]*)<?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    own = own.strip().rpartition("::")[2]
    inner = re.match(r"[\w:]+", arguments)
    if own == "device_kernel" and inner:
        own = inner[0].rpartition("::")[2]
    return own or name
