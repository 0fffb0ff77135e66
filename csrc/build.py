"""Build the library of CUDA kernels for SM 90: ``python csrc/build.py [DIRECTORY]``.

It needs nvcc, a C++20 compiler and torch's headers; no GPU, no Python headers. By default the library goes to where
:mod:`vllm_dsv32.kernels.cuda_library` looks for it. For compute-sanitizer's racecheck build it with
``--all-lanes-arrive``: of warps that arrive by one lane it reports false races.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["KERNEL_OPTIONS", "LIBRARY_NAME", "build", "find_nvcc"]

LIBRARY_NAME = "libvllm_dsv32_sm90.so"
_SOURCES = Path(__file__).resolve().parent
_PACKAGE = _SOURCES.parent / "vllm_dsv32"
_SM90 = "-gencode=arch=compute_90a,code=sm_90a"
_OPTIONS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")
KERNEL_OPTIONS = (*_OPTIONS, _SM90)
_ALL_LANES_ARRIVE = "-DDSV32_ALL_LANES_ARRIVE"
"""See warp_barriers.cuh."""
_OLDEST_TORCH = "((0ULL + 2) << 56 | (0ULL + 11) << 48)"
"""The stable ABI that is used; the build's own torch may be newer."""


def find_nvcc() -> str | None:
    """The CUDA compiler: what the path has, else that of the usual place."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def build(directory: Path = _PACKAGE, *, all_lanes_arrive: bool = False) -> Path:
    """Compile and link; returns the library.

    Raises:
        RuntimeError: there is no nvcc or no torch, or a command fails; the message has its output.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc is neither in the path nor in /usr/local/cuda/bin; install CUDA 12.8 or later")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed; its headers are needed")
    torch = Path(spec.origin).parent
    directory.mkdir(parents=True, exist_ok=True)
    kernel_options = (*KERNEL_OPTIONS, _ALL_LANES_ARRIVE) if all_lanes_arrive else KERNEL_OPTIONS
    torch_options = (*_OPTIONS, f"-I{torch / 'include'}", f"-DTORCH_TARGET_VERSION={_OLDEST_TORCH}")

    def compile_one(source: Path) -> Path:
        target = directory / f"{source.stem}.o"
        options = kernel_options if source.suffix == ".cu" else torch_options
        _run(nvcc, *options, "-c", str(source), "-o", str(target))
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sorted((*_SOURCES.glob("*.cu"), *_SOURCES.glob("*.cpp")))))
    library = directory / LIBRARY_NAME
    _run(
        nvcc,
        "-shared",
        _SM90,
        "-cudart=static",
        *map(str, objects),
        f"-L{torch / 'lib'}",
        "-ltorch_cpu",
        "-o",
        str(library),
    )
    for path in objects:
        path.unlink()
    return library


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=_PACKAGE)
    parser.add_argument("--all-lanes-arrive", action="store_true", help="for racecheck")
    arguments = parser.parse_args()
    try:
        print(build(arguments.directory, all_lanes_arrive=arguments.all_lanes_arrive))
    except RuntimeError as error:
        sys.exit(str(error))
