"""Kernels that wait are launched early, and no others are; that they wait is for ``test_triton_compile``."""

import ast
from pathlib import Path

import pytest
import torch
from triton.backends.nvidia.compiler import CUDAOptions

import vllm_dsv32.kernels
from vllm_dsv32.kernels import triton_device
from vllm_dsv32.kernels.triton_dependent_launch import dependence, launch_options

CPU = torch.device("cpu")


def launches() -> dict[str, ast.Call]:
    """Calls of the form ``kernel[grid](...)``, by file and line."""
    found = {}
    for path in sorted(Path(vllm_dsv32.kernels.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = ast.unparse(node.func.value)
                if kernel.endswith("kernel"):
                    found[f"{path.name}:{node.lineno} {kernel}"] = node
    return found


def test_every_launch_has_the_options():
    """The argument has no other source, and no default: it comes with the option."""
    assert len(launches()) >= 7
    for name, call in launches().items():
        unpacked = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
        assert sum(value.startswith("launch_options(") for value in unpacked) == 1, name


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3), (12, 0)])
def test_launches_begin_early(monkeypatch, capability):
    monkeypatch.setattr(triton_device, "capability_of", lambda device: capability)
    assert launch_options(CPU) == {"DEPENDENT": True, "launch_pdl": True}
    assert dependence(capability) == {"DEPENDENT": True}


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6), (8, 9)])
def test_launches_begin_in_turn(monkeypatch, capability):
    monkeypatch.setattr(triton_device, "capability_of", lambda device: capability)
    assert launch_options(CPU) == {"DEPENDENT": False}
    assert dependence(capability) == {"DEPENDENT": False}


def test_triton_knows_the_option():
    assert CUDAOptions(launch_pdl=True).launch_pdl
    assert not CUDAOptions().launch_pdl
