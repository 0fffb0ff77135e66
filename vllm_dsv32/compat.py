"""Which vLLM this plugin was tested with, and what differs between the ones it was."""

from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

__all__ = ["TESTED_RANGE", "keep_plain_weight", "unsupported_reason", "vllm_version"]

TESTED_RANGE = SpecifierSet(">=0.32,<0.33")
"""Equal to the requirement in pyproject.toml; a test compares them."""


def vllm_version() -> str:
    """The version that the imported vLLM code gives for itself, "0.32.0+cpu" for example."""
    import vllm

    return vllm.__version__


def unsupported_reason() -> str | None:
    """Why DeepSeek-V3.2 must not be served with this vLLM, or None if it may."""
    found = vllm_version()
    try:
        supported = TESTED_RANGE.contains(Version(found), prereleases=True)
    except InvalidVersion:
        supported = False
    if supported:
        return None
    return (
        f"vllm-dsv32 was tested with vLLM {TESTED_RANGE}, found {found}: DeepSeek-V3.2 is not served. "
        "Install a vLLM of that range or a vllm-dsv32 for this vLLM, or uninstall vllm-dsv32 to use "
        "vLLM's own implementation. Other models are not affected."
    )


def keep_plain_weight(linear: Any) -> None:
    """Keep a linear layer's ``weight`` readable after loading.

    On the CPU vLLM packs weights for its GEMM and drops the originals, unless a layer carries this mark, as
    vLLM's own MLA layer puts it on ``kv_b_proj``.
    """
    linear._cpu_skip_gemm_dispatch = True
