"""Versions and device of this machine, for results; torch is needed only by a caller of these functions."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["PACKAGES", "installed_versions", "local_device"]

PACKAGES = ("vllm-dsv32", "vllm", "torch")
"""That every result names, whether it is known or not."""


def installed_versions() -> dict[str, str | None]:
    """Those of :data:`PACKAGES`, None for what is not installed; and of Triton, CUDA and the driver if there.

    "revision" is that of the project, if it runs from a git checkout; "-dirty" at its end means with changes.
    """
    import torch

    others = {
        "revision": _revision("vllm_dsv32"),
        "triton": _installed_version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
    }
    return {
        **{name: _installed_version(name) for name in PACKAGES},
        **{name: number for name, number in others.items() if number is not None},
    }


def local_device() -> str:
    """All visible GPUs, such as "2 x NVIDIA H200"; the CPU if there are none."""
    import torch

    if num := torch.cuda.device_count():
        return f"{num} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU: {next(names, platform.machine())}, {os.cpu_count()} cores"


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision(package: str) -> str | None:
    spec = find_spec(package)
    if spec is None or spec.origin is None or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(Path(spec.origin).parent)]
    # An installed copy may lie in a checkout of something else, whose revision says nothing.
    for command in (["ls-files", "--error-unmatch", Path(spec.origin).name], ["describe", "--always", "--dirty"]):
        done = subprocess.run([*git, *command], capture_output=True, text=True)
        if done.returncode != 0:
            return None
    return done.stdout.strip()


def _driver_version() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
