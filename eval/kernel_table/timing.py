"""Time of a GPU operation: CUDA-graph replays over rotated inputs, contestants in turn; its launches; its floor."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from gpu_profile import launches_of

__all__ = ["copy_bandwidth", "launches", "microseconds"]

Call = Callable[[], object]

_REPEATS = 7
_MIN_CALLS = 20
_ENOUGH_MICROSECONDS = 20_000.0
"""Of one replay; long calls are repeated less often."""
_COPIED_NBYTES = 1 << 30


def microseconds(contestants: Mapping[str, Sequence[Call]]) -> dict[str, float]:
    """The median time of one call of each contestant.

    Args:
        contestants: name to calls of the same operation on different inputs, which together exceed the L2
            cache unless the problem itself is meant to stay in it. A call must be capturable in a graph.
    """
    graphs = {name: _capture(calls) for name, calls in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for graph, _ in graphs.values():
        graph.replay()
    for _ in range(_REPEATS):
        for name, (graph, num_calls) in graphs.items():
            times[name].append(1e3 * _elapsed_ms(graph.replay) / num_calls)
    return {name: statistics.median(series) for name, series in times.items()}


def _capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and allocates what stays
            call()
        torch.cuda.synchronize()
        once = 1e3 * _elapsed_ms(calls[0])
    num_calls = max(len(calls), min(_MIN_CALLS, int(_ENOUGH_MICROSECONDS / once) + 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            calls[i % len(calls)]()
    return graph, num_calls


def _elapsed_ms(run: Call) -> float:
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def launches(calls: Sequence[Call]) -> list[tuple[str, float]]:
    """Kernels, fills and copies of one call: their names, and the microseconds that each adds to those before it.

    All calls have been made before; of the times, the median counts.
    """
    profiles = [launches_of(call) for call in calls]
    assert len({len(launched) for launched in profiles}) == 1, profiles
    return [(same[0][0], statistics.median(us for _, us in same)) for same in zip(*profiles, strict=True)]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes that a copy within the GPU's memory reads and writes in a microsecond, at its fastest."""
    source = torch.empty(_COPIED_NBYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    fastest = min(_elapsed_ms(functools.partial(target.copy_, source)) for _ in range(_REPEATS))
    return 2 * _COPIED_NBYTES / (1e3 * fastest)
