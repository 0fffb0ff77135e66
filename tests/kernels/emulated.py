"""CUDA kernels as functions of a C library, every thread of them, under an emulator of their instructions; and what
their compiler says of them."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
_EMULATOR = Path(__file__).parent / "cuda_on_cpu"


def emulated(name: str, directory: Path, *options: str) -> ctypes.CDLL:
    """Compiles ``cuda_on_cpu/NAME.cpp`` in a directory; skips the test where there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    for source in (*SOURCES.glob("*.cu*"), *SOURCES.glob("*.h"), *_EMULATOR.iterdir()):
        shutil.copy(source, directory)  # the emulator's last: it has a ptx.cuh of its own
    library = directory / f"{name}.so"
    command = ["g++", "-std=c++20", "-O2", "-w", "-shared", "-fPIC", f"-I{directory}"]
    subprocess.run([*command, *options, str(directory / f"{name}.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def load_build():
    """csrc/build.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("csrc_build", SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spilled_nbytes(name: str, directory: Path) -> list[int]:
    """Of each kernel in ``csrc/NAME.cu``, how much it loads of what registers could not hold; skips without nvcc.

    Where the compiler cannot keep products in the background, it makes them wait for each other, and says so: that
    fails.
    """
    build = load_build()
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    source, cubin = SOURCES / f"{name}.cu", directory / "cubin"
    command = [nvcc, *build.KERNEL_OPTIONS, "-res-usage", "-cubin", source, "-o", cubin]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    report = result.stdout + result.stderr
    assert "wgmma.mma_async instructions are serialized" not in report
    return list(map(int, re.findall(r"(\d+) bytes spill loads", report)))
