"""What the figures depend on."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Versions and the device, without names of machines or paths."""
    packages = ("vllm-dsv32", "vllm", "torch", "triton")
    major, minor = torch.cuda.get_device_capability()
    return {
        "versions": {
            **{name: _version(name) for name in packages},
            "cuda": torch.version.cuda,
            "driver": _driver_version(),
        },
        "device": {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"},
    }


def _version(package: str) -> str | None:
    """None for what is not installed, or runs from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
