"""Compile the Triton kernels of the package for a compute capability, and print what came out as JSON.

    python tests/kernels/compile_kernels.py 9.0       every specialisation
    python tests/kernels/compile_kernels.py 9.0 3     one of each kernel: sample 3 of 0 to 4

A process of its own, because Triton either interprets or compiles, for good; it needs no GPU.
"""

import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import triton
from ptx_rules import negated_extrema, waits, waits_first
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

import vllm_dsv32.kernels
from vllm_dsv32.kernels.triton_compilation import Compilation

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NUM_SAMPLES = 5
NUM_PROCESSES = 2


GLUON_CAPABILITIES = ((9, 0),)


def modules(capability: tuple[int, int]) -> Iterator[ModuleType]:
    """Those in Triton, and in Gluon those for a GPU that Gluon kernels are written for."""
    parts = ("_triton", "_gluon") if capability in GLUON_CAPABILITIES else ("_triton",)
    for path in sorted(Path(vllm_dsv32.kernels.__file__).parent.glob("*.py")):
        if any(part in path.stem for part in parts):
            yield importlib.import_module(f"vllm_dsv32.kernels.{path.stem}")


def kernels_of(module: ModuleType) -> list[str]:
    """What the module defines to be launched; functions that its kernels call have other endings."""
    return [
        full_name(value)
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction)
        and name.endswith("_kernel")
        and value.__module__ == module.__name__
    ]


def full_name(kernel: triton.JITFunction) -> str:
    return f"{kernel.__module__}:{kernel.__name__}"


def sampled(compilations: list[Compilation], sample: int) -> list[Compilation]:
    """One specialisation of each kernel, spread so that all samples together have seen much of each."""
    kernels: dict[str, list[Compilation]] = {}
    for compilation in compilations:
        kernels.setdefault(full_name(compilation.kernel), []).append(compilation)
    return [group[len(group) * sample // NUM_SAMPLES] for group in kernels.values()]


def compile_nth(capability: tuple[int, int], sample: int | None, n: int) -> dict:
    return compile_for(capability, selection(capability, sample)[n])


def selection(capability: tuple[int, int], sample: int | None) -> list[Compilation]:
    offering = [module for module in modules(capability) if hasattr(module, "compilations")]
    compilations = [compilation for module in offering for compilation in module.compilations(capability)]
    return compilations if sample is None else sampled(compilations, sample)


def compile_for(capability: tuple[int, int], compilation: Compilation) -> dict:
    # A launch finds pointers and strides divisible by 16, and the compiler reads memory in whole words for it.
    names = list(compilation.signature)
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in compilation.signature.items()
        if kind.startswith("*") or ("stride" in name and kind in ("i32", "i64"))
    }
    signature = compilation.signature | dict.fromkeys(compilation.constexprs, "constexpr")
    kind_of_source = GluonASTSource if isinstance(compilation.kernel, GluonJITFunction) else ASTSource
    source = kind_of_source(compilation.kernel, signature, compilation.constexprs, attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    options = {
        "num_warps": compilation.num_warps,
        "num_stages": compilation.num_stages,
        "maxnreg": compilation.max_registers,
    }
    compiled = triton.compile(source, target=target, options=options)
    return {
        "name": compilation.name,
        "kernel": full_name(compilation.kernel),
        "shared_nbytes": compiled.metadata.shared,
        "num_negated_extrema": negated_extrema(compiled.asm["ptx"]),
        "waits": waits(compiled.asm["ptx"]),
        "waits_first": waits_first(compiled.asm["ptx"]),
        **resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"num_registers": int(registers), "stack_nbytes": int(stack)}


def main(capability: tuple[int, int], sample: int | None) -> None:
    # A module with "_gluon" in its name, as sparse_mla_gluon_fp8, may define what sparse_mla_gluon launches.
    kernels = [name for module in modules(capability) for name in kernels_of(module)]
    indices = range(len(selection(capability, sample)))
    # Jitted functions cannot be sent to another process, but a fork has them.
    with multiprocessing.get_context("fork").Pool(NUM_PROCESSES) as pool:
        compiled = pool.map(partial(compile_nth, capability, sample), indices, chunksize=1)
    json.dump({"kernels": kernels, "compiled": compiled}, sys.stdout)


if __name__ == "__main__":
    major, _, minor = sys.argv[1].partition(".")
    main((int(major), int(minor)), int(sys.argv[2]) if len(sys.argv) > 2 else None)
