"""The process that runs the tests, before torch and vLLM are imported in it."""

import os
from pathlib import Path

import pytest

# One thread: with two, vLLM's and torch's OpenMP pools wait for each other on a two-core machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda-graphs",
        action="store_true",
        help="engines capture CUDA graphs where tests allow it (default: eager)",
    )
    parser.addoption(
        "--vllm-sources",
        type=Path,
        metavar="DIR",
        help="a folder that holds another vLLM's Python files as DIR/vllm (an unpacked wheel): the plugin is "
        "checked against them too, without importing them",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Triton decides on its import whether kernels are compiled or interpreted; vLLM's import is one."""
    import torch

    if config.getoption("--cuda-graphs"):
        # As vLLM itself does for this model, but before tests import its layers, which are decorated then.
        os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        if config.getoption("--cuda-graphs"):
            raise pytest.UsageError("--cuda-graphs: no CUDA device here")
