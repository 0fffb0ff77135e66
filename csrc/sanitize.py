"""compute-sanitizer's memcheck and racecheck over small problems of every CUDA kernel: ``python csrc/sanitize.py``.

It needs a GPU of SM 90, CUDA's toolkit and torch. The library is built anew, with ``--all-lanes-arrive``, into a
copy of the package: what is installed stays as it is. The problems are those of tests/kernels/sanitizer_cases.py,
which compares results too. Exits with 1 if a tool or a comparison finds something.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from build import build

_ROOT = Path(__file__).resolve().parents[1]
_TOOLS = ("memcheck", "racecheck")
_CASES = (
    "index_logits",
    "sparse_mla",
    "sparse_mla_wide",
    "sparse_mla_bf16_wide",
    "sparse_mla_bf16_union",
    "sparse_mla_fp8_union",
    "topk_select",
)
_FOUND = 9
"""How the sanitizer exits where a tool finds something."""


def main() -> int:
    """Run each tool on each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=_CASES, default=_CASES, metavar="KERNEL")
    arguments = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        sys.exit(
            "compute-sanitizer is neither in the path nor in /usr/local/cuda/bin; it is part of CUDA's toolkit"
        )
    with tempfile.TemporaryDirectory() as copy:
        package = Path(copy) / "vllm_dsv32"
        shutil.copytree(_ROOT / "vllm_dsv32", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        try:
            build(package, all_lanes_arrive=True)
        except RuntimeError as error:
            sys.exit(str(error))
        paths = os.pathsep.join((copy, str(_ROOT / "tests")))
        # Each allocation on its own, so that what lies behind it may not be read.
        environment = os.environ | {"PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        failed = False
        for tool in _TOOLS:
            for case in arguments.only:
                command = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND)]
                command += [sys.executable, "-m", "kernels.sanitizer_cases", case]
                result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=copy)
                failed |= result.returncode != 0
                print(f"{tool} of {case}: {'ok' if result.returncode == 0 else 'FAILED'}", flush=True)
                print(
                    result.stdout[-4000:] + result.stderr[-4000:]
                    if result.returncode
                    else _last_line(result.stdout)
                )
    return int(failed)


def _last_line(text: str) -> str:
    return "  " + text.rstrip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main())
