"""What the figures depend on."""

from typing import Any

import torch
from this_machine import installed_versions

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Versions and the device, without names of machines or paths."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "versions": installed_versions(),
        "device": {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"},
    }
