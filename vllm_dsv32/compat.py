"""Which vLLM this plugin was tested with, and what differs between them.

Of all that the plugin uses, 0.33 has other signatures only for the logits of the DeepGEMM that it ships;
``pytest tests/plugin/test_vllm_versions.py --vllm-sources DIR`` compares.
"""

from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

__all__ = [
    "TESTED_RANGE",
    "keep_plain_weight",
    "mqa_logits_options",
    "paged_mqa_logits_options",
    "unsupported_reason",
    "vllm_version",
]

TESTED_RANGE = SpecifierSet(">=0.32,<0.34")
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


def mqa_logits_options(max_num_keys: int) -> dict[str, Any]:
    """What ``vllm.utils.deep_gemm.fp8_fp4_mqa_logits`` takes beside its operands.

    Before 0.33 a row of its result has a column for each key; since then the first column is the row's first
    key, and the width is asked for. Where every row starts at key 0, the two are the same.

    Args:
        max_num_keys: the number of keys, and so of columns.
    """
    return {"clean_logits": False} if _is_before(0, 33) else {"max_seqlen_k": max_num_keys}


def paged_mqa_logits_options() -> dict[str, Any]:
    """What ``vllm.utils.deep_gemm.fp8_fp4_paged_mqa_logits`` takes beside its operands.

    Columns past a row's keys are left as they are: before 0.33 if asked to, since then always.
    """
    return {"clean_logits": False} if _is_before(0, 33) else {}


def _is_before(*release: int) -> bool:
    return Version(vllm_version()).release < release
