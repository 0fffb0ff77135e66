"""What a Triton module says of its kernels, so that they can be compiled for a GPU that is not there."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Compilation"]


@dataclass(frozen=True)
class Compilation:
    """One specialisation of one kernel, as a launch on the GPU would compile it.

    A module ``*_triton.py`` yields them from its public function ``compilations(capability)``: one for each
    code path and shape class that serves a model on that compute capability.
    """

    name: str
    """For people: the kernel and what is special about this specialisation."""
    kernel: Any
    """The function under ``triton.jit``."""
    signature: dict[str, str]
    """Argument to Triton's name of its type: ``*bf16``, ``i32``, ..., ``constexpr`` for those below."""
    constexprs: dict[str, object]
    """Values of the arguments that are ``tl.constexpr``."""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Of a thread, if the launch limits them."""
