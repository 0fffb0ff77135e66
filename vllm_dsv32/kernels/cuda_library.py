"""The library of CUDA kernels that ``csrc/build.py`` builds: finds it, loads it, or says why not.

Its operators are ``torch.ops.vllm_dsv32``. They write to tensors that the caller has allocated and return nothing.
"""

from functools import cache
from pathlib import Path

import torch

__all__ = ["CAPABILITY", "LIBRARY_NAME", "refusal", "require"]

CAPABILITY = (9, 0)
"""What the kernels are compiled for; their code runs on nothing else."""
LIBRARY_NAME = "libvllm_dsv32_sm90.so"
_PATH = Path(__file__).resolve().parents[1] / LIBRARY_NAME
_REMEDY = "in a checkout, python csrc/build.py builds it with nvcc"
_OPERATORS = (
    "index_logits",
    "latent_pages",
    "slot_union",
    "sparse_mla_bf16_union",
    "sparse_mla_bf16_wide",
    "sparse_mla_fp8",
    "sparse_mla_fp8_wide",
    "topk_select",
)


@cache
def refusal(path: Path = _PATH) -> str | None:
    """Load the library, once; why it is not to be had, or None."""
    if not path.exists():
        return f"needs {LIBRARY_NAME}, which was not built; {_REMEDY}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} cannot be loaded (torch {torch.__version__}): {error}; {_REMEDY}"
    missing = [operator for operator in _OPERATORS if not hasattr(torch.ops.vllm_dsv32, operator)]
    if missing:
        return f"{path} has no {', '.join(missing)}: it was built from other sources; {_REMEDY}"
    for operator in _OPERATORS:
        torch.library.register_fake(f"vllm_dsv32::{operator}", _writes_its_arguments)
    return None


def require() -> None:
    """Load the library.

    Raises:
        RuntimeError: it is not to be had; the message says why.
    """
    reason = refusal()
    if reason is not None:
        raise RuntimeError(reason)


def _writes_its_arguments(*_: object) -> None:
    """What an operator returns whose results are arguments."""
