"""setuptools commands, named in pyproject.toml: the wheel has the CUDA kernels where nvcc and torch are.

Build with them by ``pip wheel --no-build-isolation .``: an isolated build has no torch.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

__all__ = ["BuildKernels", "KernelWheel"]

_SOURCES = Path(__file__).resolve().parent
_ROOT = _SOURCES.parent


def _load_build() -> ModuleType:
    """build.py beside this file; neither is part of a package."""
    spec = importlib.util.spec_from_file_location("csrc_build", _SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_kernels = _load_build()
_MISSING = [
    name
    for name, found in (("nvcc", _kernels.find_nvcc()), ("torch", importlib.util.find_spec("torch")))
    if not found
]


class BuildKernels(build_py):
    """Copies the package, and builds the kernels into the copy."""

    def run(self) -> None:
        """Says so where it cannot build them."""
        super().run()
        if _MISSING:
            print(f"CUDA kernels are not built: no {' and no '.join(_MISSING)} here", file=sys.stderr)
            return
        _kernels.build(_ROOT / "vllm_dsv32" if self.editable_mode else Path(self.build_lib) / "vllm_dsv32")

    def get_source_files(self) -> list[str]:
        """What a source distribution holds: the kernels' sources too."""
        sources = sorted(path for path in _SOURCES.iterdir() if path.is_file())
        return [*super().get_source_files(), *(str(path.relative_to(_ROOT)) for path in sources)]


class KernelWheel(bdist_wheel):
    """With kernels for one platform and, as these know only torch's stable ABI, any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python, no ABI of Python, this platform."""
        if _MISSING:
            return super().get_tag()
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")
