"""Which of vLLM's compiled libraries are installed."""

import functools
import importlib.util
from importlib.machinery import PathFinder

__all__ = ["is_installed"]


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module can be found. Nothing is imported, not even the packages that hold it."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(f"{spec.name}.{name}", spec.submodule_search_locations)
    return spec is not None
