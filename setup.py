"""What pyproject.toml cannot say: the wheel has the CUDA kernels where nvcc and torch are.

Build with them by ``pip wheel --no-build-isolation .``: an isolated build has no torch.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build() -> ModuleType:
    """csrc/build.py as a module; it is part of no package."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = load_build()
MISSING = [
    name
    for name, found in (("nvcc", kernels.find_nvcc()), ("torch", importlib.util.find_spec("torch")))
    if not found
]


class BuildKernels(build_py):
    """Copies the package, and builds the kernels into the copy."""

    def run(self) -> None:
        """Says so where it cannot build them."""
        super().run()
        if MISSING:
            print(f"CUDA kernels are not built: no {' and no '.join(MISSING)} here", file=sys.stderr)
            return
        kernels.build(ROOT / "vllm_dsv32" if self.editable_mode else Path(self.build_lib) / "vllm_dsv32")


class KernelWheel(bdist_wheel):
    """With kernels for one platform and, as these know only torch's stable ABI, any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python, no ABI of Python, this platform."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if MISSING else ("py3", "none", platform)


class PlatformDistribution(Distribution):
    """With a library, what is installed depends on the platform."""

    def has_ext_modules(self) -> bool:
        """What setuptools asks to find out."""
        return not MISSING


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildKernels, "bdist_wheel": KernelWheel})
