"""Attention depends on the batch, so pieces of CUDA graphs end before it."""

import subprocess
import sys

import pytest
from packaging.version import Version
from vllm.config import CUDAGraphMode

from vllm_dsv32.attention.graph_break import require_graph_break
from vllm_dsv32.compat import vllm_version
from vllm_dsv32.errors import ConfigError

VARIABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"

IMPORT = f"""
import os
from vllm.config import CUDAGraphMode
from vllm_dsv32.attention.graph_break import require_graph_break
from vllm_dsv32.attention.sparse_attention import SparseAttention
os.environ["{VARIABLE}"] = "1"  # as vLLM does when it has seen the model
require_graph_break(SparseAttention.forward, CUDAGraphMode.FULL_AND_PIECEWISE)
"""


def decorated():
    """What a decorator leaves."""


decorated.__wrapped__ = decorated


def plain():
    """What an import that is too early leaves."""


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_layers_without_a_break_are_refused_where_graphs_come_in_pieces(monkeypatch, mode):
    monkeypatch.setenv(VARIABLE, "1")
    require_graph_break(decorated, mode)
    with pytest.raises(ConfigError, match=f"test_graph_break was imported .* set {VARIABLE}=1 before the import"):
        require_graph_break(plain, mode)


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        (None, "1"),
        (CUDAGraphMode.NONE, "1"),
        (CUDAGraphMode.FULL_DECODE_ONLY, "1"),
        (CUDAGraphMode.FULL_AND_PIECEWISE, "0"),  # torch.compile divides the model then
    ],
)
def test_otherwise_nothing_has_to_be_decorated(monkeypatch, mode, value):
    monkeypatch.setenv(VARIABLE, value)
    require_graph_break(plain, mode)


@pytest.mark.parametrize("value", ["1", None])
def test_when_attention_is_decorated(monkeypatch, value):
    """Before 0.33 only if it is imported with the variable set."""
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    refused = "ConfigError: vllm_dsv32.attention.sparse_attention was imported before" in result.stderr
    assert refused == (value is None and Version(vllm_version()).release < (0, 33)), result.stderr
    assert result.returncode == int(refused), result.stderr
