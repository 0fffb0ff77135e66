"""What torch's profiler says of the kernels that a call launches: their names, shortened, and their times."""

import re
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["LAUNCH_TIMES", "launches_of", "short_name", "times_added"]

LAUNCH_TIMES = "what each adds to the time of those before it"


def launches_of(call: Callable[[], object]) -> list[tuple[str, float]]:
    """Kernels, fills and copies in the order of their start, with the microseconds that each adds to the others.

    Without a GPU there are none.
    """
    if not torch.cuda.is_available():
        call()
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.time_range.end, short_name(event.name))
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA
    ]
    return times_added(sorted(events))


def times_added(launches: Iterable[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """Of launches in the order of their start, with their end and name: what they add together is the time of all.

    A kernel may start before the last one has ended, and wait for it: that time is the last one's alone.
    """
    times, end_of_all = [], -float("inf")
    for start, end, name in launches:
        times.append((name, max(0.0, end - max(start, end_of_all))))
        end_of_all = max(end, end_of_all)
    return times


def short_name(name: str) -> str:
    """A kernel's own name, without its type, namespaces and arguments; of CUTLASS's launcher, what it runs."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", name).removeprefix("void ")
    own, arguments = re.match(r"([^<(]*)<?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    own = own.strip().rpartition("::")[2]
    inner = re.match(r"[\w:]+", arguments)
    if own == "device_kernel" and inner:
        own = inner[0].rpartition("::")[2]
    return own or name
