"""Launches that begin while the one before still runs: programmatic dependent launch, from SM 90 on.

A decode step is a chain of kernels of a few microseconds, and between two of them lies about one more: the end of
one is seen, and the next is started. Here the next is started as soon as every program of the one before runs, and
waits at its first line until that one has ended and its writes are seen.

That holds for whole chains: no program ends, by an early return either, without having waited. So when a launch has
ended, the one before it had, and so had all before that one. A launch of others that may begin early must wait in
all of its programs as well, which is CUDA's rule for them. One that does not begin early, as most of torch's, is
ordered as ever: it begins when the one before has ended.

So the first line of every kernel is :func:`wait_for_launches_before`; nothing may be read or written above it, and
nothing may branch.
"""

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels import triton_device

__all__ = ["dependence", "launch_options", "wait_for_launches_before"]


@triton.jit
def wait_for_launches_before(DEPENDENT: tl.constexpr) -> None:
    """Wait for all work that was launched before; the launch after this one may begin, and waits likewise."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def dependence(capability: tuple[int, int] | None) -> dict[str, object]:
    """The argument of a kernel that says whether a GPU can do it; a capability of None is Triton's interpreter."""
    return {"DEPENDENT": capability is not None and capability >= (9, 0)}


def launch_options(device: torch.device) -> dict[str, object]:
    """That argument, and the option of the launch that it must come with."""
    argument = dependence(triton_device.capability_of(device))
    return {**argument, "launch_pdl": True} if argument["DEPENDENT"] else argument
