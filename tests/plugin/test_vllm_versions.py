"""Every name and signature of vLLM's that the plugin relies on, in the installed vLLM and in another one's sources.

mypy does the comparing: it reads both without importing either, follows re-exports, and knows when an override
no longer fits. The project's own type check takes all of vLLM as Any, so that it does not depend on the version.

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0-*.whl '*.py' -d DIR
    pytest tests/plugin/test_vllm_versions.py --vllm-sources DIR
"""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

import vllm_dsv32
from vllm_dsv32 import compat

PACKAGE = Path(vllm_dsv32.__file__).parent

MYPY_CONFIG = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
check_untyped_defs = True
[mypy-torch.*,transformers.*,triton.*,numpy.*]
follow_imports = skip
[mypy-vllm.*]
ignore_errors = True
ignore_missing_imports = False
"""

# Kinds of findings that speak of names and signatures. The others are of types, where vLLM is not strict.
CODES = {"abstract", "arg-type", "attr-defined", "call-arg", "import-not-found", "misc", "name-defined", "override"}

EXPECTED = {
    # A draft model also takes the target's hidden states; SupportsPP describes target models.
    ("model/mtp.py", 'Signature of "forward" incompatible with supertype'),
}

# What vLLM does with our classes: it builds them, so nothing may be abstract, and it calls the hook as its own.
USES = """
from typing import Any
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.utils import deep_gemm
from vllm_dsv32.attention.backend import IndexKeyBackend, SparseMlaBackend
from vllm_dsv32.attention.caches import IndexKeyCache, LatentCache
from vllm_dsv32.attention.metadata import CacheMetadataBuilder, DsaMetadataBuilder
from vllm_dsv32.model import Dsv32ForCausalLM, Dsv32MTP
from vllm_dsv32.plugin import Dsv32ConfigHook
from vllm_dsv32.serving.reasoning_parser import Dsv32ReasoningParser
from vllm_dsv32.serving.renderer import Dsv32Renderer
from vllm_dsv32.serving.tool_parser import Dsv32ToolParser

class Hook(Dsv32ConfigHook, VerifyAndUpdateConfig): ...

def use(x: Any) -> None:
    SparseMlaBackend(), IndexKeyBackend(), IndexKeyCache(x), LatentCache(x, x)
    CacheMetadataBuilder(x, x, x, x), DsaMetadataBuilder(x, x, x, x)
    Dsv32ForCausalLM(vllm_config=x), Dsv32MTP(vllm_config=x)
    Dsv32ReasoningParser(x), Dsv32Renderer(x, x), Dsv32ToolParser(x, x)
    deep_gemm.fp8_fp4_mqa_logits(x, x, x, x, x, {mqa})
    deep_gemm.fp8_fp4_paged_mqa_logits(x, x, x, x, x, x, x, {paged})
"""

# Mistakes of each kind, each to be found on its line: who finds none has looked at nothing.
MISTAKES = """
from typing import Any
from vllm.config import VllmConfig
from vllm.no_such_module import anything  # import-not-found
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import ChatParams
from vllm.tool_parsers.abstract_tool_parser import ToolParser
from vllm.utils import deep_gemm
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MLAAttentionSpec
from vllm.v1.kv_cache_interface import no_such_name  # attr-defined

class Backend(AttentionBackend):
    @staticmethod
    def get_supported_kernel_block_sizes() -> Any: ...  # override

class Builder(AttentionMetadataBuilder[Any]): ...

class Parser(ToolParser):
    def extract_tool_calls(self, model_output: str) -> Any: ...  # override

class Renderer(BaseRenderer[Any]):
    def other(self) -> Any:
        return self._no_such_member  # attr-defined

def use(x: Any, config: VllmConfig, params: ChatParams, common: CommonAttentionMetadata) -> None:
    Renderer.render_messages(x, renamed=x, params=x)  # call-arg
    Builder(x, x, x, x)  # abstract
    MLAAttentionSpec(block_size=x, num_kv_heads=x, head_size=x, dtype=x, no_such_field=x)  # call-arg
    MLAAttentionSpec(block_size=x)  # call-arg
    config.scheduler_config.no_such_setting  # attr-defined
    params.no_such_method()  # attr-defined
    common.no_such_field  # attr-defined
    deep_gemm.fp8_fp4_mqa_logits(x, x, x, x, x, {wrong_mqa})  # call-arg
"""


OURS = (
    "attention.backend:SparseMlaBackend",
    "attention.backend:IndexKeyBackend",
    "attention.caches:IndexKeyCache",
    "attention.caches:LatentCache",
    "attention.metadata:CacheMetadataBuilder",
    "attention.metadata:DsaMetadataBuilder",
    "serving.reasoning_parser:Dsv32ReasoningParser",
    "serving.renderer:Dsv32Renderer",
    "serving.tool_parser:Dsv32ToolParser",
)


def keywords(names: Iterable[str]) -> str:
    return ", ".join(f"{name}=x" for name in names)


def overrides() -> list[tuple[type, str, list[str]]]:
    """Base class of vLLM's, method, and what we call its parameters, for all that ``OURS`` override."""
    found = []
    for target in OURS:
        module, _, name = target.partition(":")
        ours = getattr(importlib.import_module(f"vllm_dsv32.{module}"), name)
        for cls in (cls for cls in ours.__mro__ if cls.__module__.startswith("vllm_dsv32.")):
            for base in (base for base in cls.__mro__ if base.__module__.startswith("vllm.")):
                for method in sorted(vars(cls).keys() & vars(base).keys()):
                    if not method.startswith("__") and callable(getattr(cls, method)):
                        parameters = inspect.signature(getattr(cls, method)).parameters
                        found.append((base, method, [name for name in parameters if name != "self"]))
    return found


def calls_by_keyword() -> str:
    """vLLM may call an override by its own names of the parameters, so ours must be those; mypy does not mind."""
    calls = []
    for base, method, parameters in overrides():
        calls.append(
            f"def call_{len(calls)}(x: Any) -> Any:\n"
            f"    from {base.__module__} import {base.__name__}\n"
            f"    base: {base.__name__} = x\n"
            f"    return base.{method}({keywords(parameters)})\n"
        )
    return "".join(calls)


@dataclass(frozen=True)
class Finding:
    path: Path
    line: int
    code: str
    message: str


@dataclass(frozen=True)
class Comparison:
    """mypy's findings for one vLLM."""

    in_package: list[Finding]
    in_uses: list[Finding]
    in_mistakes: list[Finding]
    mistakes: str


def compare(version: str, sources: Path | None, folder: Path) -> Comparison:
    """Check the package and both probes against the installed vLLM, or against ``sources``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "vllm_version", lambda: version)
        mqa, paged = compat.mqa_logits_options(1), compat.paged_mqa_logits_options()
        patch.setattr(compat, "vllm_version", lambda: "0.33.0" if "clean_logits" in mqa else "0.32.0")
        wrong_mqa = compat.mqa_logits_options(1)
    texts = {
        "uses.py": USES.format(mqa=keywords(mqa), paged=keywords(paged)) + calls_by_keyword(),
        "mistakes.py": MISTAKES.format(wrong_mqa=keywords(wrong_mqa)),
        "mypy.ini": MYPY_CONFIG,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    command = (
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        "cache",
        "--output",
        "json",
    )
    done = subprocess.run(
        [*command, PACKAGE, "uses.py", "mistakes.py"],
        cwd=folder,
        env=os.environ | {"MYPYPATH": os.pathsep.join(map(str, filter(None, (sources, PACKAGE.parent))))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # 0: the mistakes were not found; 2: mypy failed
    found = []
    for line in done.stdout.splitlines():
        entry = json.loads(line)
        if entry["severity"] == "error" and entry["code"] in CODES:
            path = (folder / entry["file"]).resolve()
            found.append(Finding(path, entry["line"], entry["code"], entry["message"]))
    uses, mistakes = (folder / "uses.py").resolve(), (folder / "mistakes.py").resolve()
    return Comparison(
        [finding for finding in found if PACKAGE in finding.path.parents],
        [finding for finding in found if finding.path == uses],
        [finding for finding in found if finding.path == mistakes],
        texts["mistakes.py"],
    )


def version_of(sources: Path) -> str:
    match = re.search(r"^__version__ = version = '(.+)'", (sources / "vllm/_version.py").read_text(), re.MULTILINE)
    assert match is not None, f"{sources / 'vllm/_version.py'} does not say which version it is"
    return match[1]


@pytest.fixture(scope="module", params=["installed", "other"])
def comparison(request, tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("comparison")
    if request.param == "installed":
        return compare(compat.vllm_version(), None, folder)
    sources = request.config.getoption("--vllm-sources")
    if sources is None:
        pytest.skip("needs the sources of another vLLM: --vllm-sources DIR")
    if not (sources / "vllm" / "__init__.py").is_file():
        raise pytest.UsageError(f"--vllm-sources {sources}: expected the package vllm in it, found none")
    return compare(version_of(sources), sources.resolve(), folder)


def test_what_the_package_uses_is_there(comparison):
    found = {(str(finding.path.relative_to(PACKAGE)), finding.message) for finding in comparison.in_package}
    unexpected = {
        (path, message)
        for path, message in found
        if not any(path == where and message.startswith(text) for where, text in EXPECTED)
    }
    assert not unexpected
    assert len(found) == len(EXPECTED)


def test_vllm_can_use_what_it_is_given(comparison):
    assert not comparison.in_uses


def test_mistakes_are_found(comparison):
    marked = re.compile(r".*  # (\S+)$")
    wanted = {
        (number, match[1])
        for number, line in enumerate(comparison.mistakes.splitlines(), 1)
        if (match := marked.match(line)) is not None
    }
    assert {(finding.line, finding.code) for finding in comparison.in_mistakes} == wanted


def imported_names() -> list[tuple[str, str]]:
    """Module and name of every import from vLLM, also those in functions; vendor kernels import CUDA libraries."""
    return sorted(
        {
            (node.module, alias.name)
            for path in PACKAGE.rglob("*.py")
            if path.parent.name != "vendor"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
            for alias in node.names
        }
    )


@pytest.mark.parametrize(("module", "name"), imported_names(), ids=map(".".join, imported_names()))
def test_the_installed_vllm_has(module, name):
    """Some modules of vLLM make up attributes as they are asked for, which mypy believes."""
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.import_module(f"{module}.{name}")
