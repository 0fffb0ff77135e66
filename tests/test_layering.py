"""Who may import whom. A reader can trust the tree: a layer knows only what stands above it in the table."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_dsv32

PACKAGE = Path(vllm_dsv32.__file__).parent

# Layer -> (layers of the package, other packages than torch and the standard library) that it may import.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "layout": (set(), set()),
    "checkpoint_tensors": (set(), set()),
    "compat": (set(), {"packaging", "vllm"}),
    "kernels": ({"errors", "layout"}, {"triton"}),
    "kernels/vendor": ({"layout", "compat"}, {"vllm"}),
    "config": ({"errors", "layout", "kernels"}, {"vllm"}),
    "attention": ({"errors", "layout", "compat", "kernels", "config"}, {"vllm"}),
    "model": ({"errors", "checkpoint_tensors", "compat", "config", "attention"}, {"vllm"}),
    "serving": ({"errors"}, {"vllm", "transformers", "openai", "regex", "pydantic"}),
    "refusal": ({"errors", "compat"}, set()),
    "startup": (set(), {"vllm"}),
    "plugin": ({"compat", "config", "startup"}, {"vllm"}),
    "tools": (
        {"errors", "checkpoint_tensors", "compat", "plugin", "kernels", "layout", "startup"},
        {"vllm", "transformers", "tokenizers", "safetensors"},
    ),
}
# Only the entry point runs in every process; what it imports at once must cost nothing.
AT_ONCE = {"plugin": ({"compat"}, set()), "compat": (set(), {"packaging"})}


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return "kernels/vendor" if parts[:2] == ("kernels", "vendor") else parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        or (top_level_only and isinstance(node, ast.FunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""
            if node.module == "vllm_dsv32":
                yield from (f"vllm_dsv32.{alias.name}" for alias in node.names)


def violations(path: Path, allowed: tuple[set[str], set[str]], top_level_only: bool = False) -> list[str]:
    import sys

    layer, (ours, others) = layer_of(path), allowed
    found = []
    for name in imports(path, top_level_only):
        package, _, rest = name.partition(".")
        if package == "vllm_dsv32":
            target = rest.partition(".")[0]
            if target and target != layer and target not in ours:
                found.append(name)
        elif package not in others | {"torch"} | set(sys.stdlib_module_names):
            found.append(name)
    return found


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_keep_to_the_layers(path):
    assert not violations(path, ALLOWED[layer_of(path)])


@pytest.mark.parametrize("layer", AT_ONCE)
def test_the_entry_point_imports_nothing_heavy_at_once(layer):
    path = PACKAGE / f"{layer}.py"
    assert not violations(path, AT_ONCE[layer], top_level_only=True)
    assert "torch" not in imports(path, top_level_only=True)


def test_no_environment_variables():
    for path in SOURCES:
        if layer_of(path) not in ("tools", "startup"):  # which report and set vLLM's own
            assert "os.environ" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path


def test_a_violation_is_seen(tmp_path):
    path = PACKAGE / "kernels" / "dispatch.py"
    assert violations(path, (set(), set())) == ["vllm_dsv32.errors", "vllm_dsv32.layout"]
