"""What vLLM finds under our names, in a process that starts as `vllm serve` does."""

import json
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vllm_dsv32 import compat
from vllm_dsv32.kernels import cuda_library
from vllm_dsv32.plugin import REGISTRATIONS

ROOT = Path(__file__).parents[2]

HEAVY = (
    "torch._dynamo",
    "vllm.model_executor.layers.attention.mla_attention",
    "vllm.model_executor.models.deepseek_v2",
    "vllm_dsv32.attention",
    "vllm_dsv32.model",
    "vllm_dsv32.serving",
    "vllm_dsv32.kernels",
    "vllm_dsv32.config",
)


def run(code: str, **environment: str) -> dict:
    """Run a script in a fresh process; its last line is JSON."""
    import os

    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def fresh_process() -> dict:
    return run(f"""
        import json, sys
        import vllm.plugins
        before = set(sys.modules)
        vllm.plugins.load_general_plugins()
        heavy = [name for name in {HEAVY!r} if name in set(sys.modules) - before]
        from vllm_dsv32.plugin import REGISTRATIONS
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.reasoning import ReasoningParserManager
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry
        from vllm.tool_parsers import ToolParserManager
        resolve = dict(
            model=lambda name: ModelRegistry.models[name].load_model_cls(),
            config=MODELS_CONFIG_MAP.__getitem__,
            tokenizer=TokenizerRegistry.load_tokenizer_cls,
            renderer=RENDERER_REGISTRY.load_renderer_cls,
            tool_parser=ToolParserManager.get_tool_parser,
            reasoning_parser=ReasoningParserManager.get_reasoning_parser,
        )
        found = {{}}
        for surface, name in [(r.surface, r.name) for r in REGISTRATIONS] + [("model", "DeepSeekMTPModel")]:
            cls = resolve[surface](name)
            found[f"{{surface}} {{name}}"] = [cls.__module__, cls.__qualname__]
        print(json.dumps(dict(heavy=heavy, found=found)))
    """)


@pytest.mark.parametrize("registration", REGISTRATIONS, ids=lambda r: f"{r.surface} {r.name}")
def test_each_name_resolves_to_our_class(fresh_process, registration):
    module, name = fresh_process["found"][f"{registration.surface} {registration.name}"]
    assert name == registration.class_name
    assert module.startswith(registration.module)


def test_the_draft_model_of_v3_is_not_ours(fresh_process):
    assert fresh_process["found"]["model DeepSeekMTPModel"][0].startswith("vllm.")


def test_registering_imports_nothing_heavy(fresh_process):
    assert fresh_process["heavy"] == []


def test_one_entry_point_and_one_version_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"vllm_dsv32": "vllm_dsv32.plugin:register"}
    (requirement,) = [Requirement(text) for text in project["dependencies"]]
    assert (requirement.name, requirement.specifier) == ("vllm", compat.TESTED_RANGE)


def test_what_is_no_python_is_packaged():
    """py.typed, which tells a user's type checker that the package has annotations; not what csrc/build.py left."""
    package = ROOT / "vllm_dsv32"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    files.discard(package / cuda_library.LIBRARY_NAME)
    assert package / "py.typed" in files
    assert files == {path for pattern in settings["package-data"]["vllm_dsv32"] for path in package.glob(pattern)}
