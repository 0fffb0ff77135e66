"""CUDA kernels as functions of a C library, every thread of them, under an emulator of their instructions."""

import ctypes
import importlib.util
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
