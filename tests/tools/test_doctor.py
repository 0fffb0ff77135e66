"""Each environment needs a process of its own, most of whose time goes into importing vLLM; they run at once."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from vllm_dsv32.kernels import cuda_library
from vllm_dsv32.kernels.dispatch import OPERATIONS
from vllm_dsv32.plugin import REGISTRATIONS
from vllm_dsv32.tools import doctor

COMMAND = Path(sys.executable).parent / "vllm-dsv32"
OTHER_PLUGIN = """
from vllm.tool_parsers import ToolParser, ToolParserManager

class OtherParser(ToolParser):
    pass

def register():
    # An eager registration wins over a lazy one, in whatever order plugins load.
    ToolParserManager.register_module("deepseek_v32", force=True, module=OtherParser)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    other = tmp_path_factory.mktemp("other")
    (other / "other_plugin.py").write_text(OTHER_PLUGIN)
    metadata = other / "other_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nother = other_plugin:register\n")
    plain = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    path = os.pathsep.join(filter(None, [str(other), os.environ.get("PYTHONPATH")]))
    commands = {
        "here": (["--json"], {}),
        "left out": ([], {"VLLM_PLUGINS": ""}),
        "bypassed": (["--json"], {"VLLM_USE_RUST_FRONTEND": "1", "PYTHONPATH": path}),
    }
    started = {
        name: subprocess.Popen(
            [COMMAND, "doctor", *flags],
            env=plain | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (flags, variables) in commands.items()
    }
    finished = {}
    try:
        for name, process in started.items():
            output, errors = process.communicate(timeout=600)
            finished[name] = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    return finished


def conforms(value: Any, hint: Any) -> bool:
    """Whether a parsed JSON value has the type that an annotation promises."""
    if is_typeddict(hint):
        hints = get_type_hints(hint)
        return value.keys() == hints.keys() and all(conforms(value[key], hints[key]) for key in hints)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(conforms(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(conforms(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and all(map(conforms, value, arguments))
    if origin is dict:
        return all(isinstance(key, str) and conforms(item, arguments[1]) for key, item in value.items())
    return isinstance(value, hint)


def test_report_follows_its_schema(runs) -> None:
    for name in ("here", "bypassed"):
        report = json.loads(runs[name].stdout)
        assert conforms(report, doctor.Report), report
        assert [(item["surface"], item["name"]) for item in report["registrations"]] == [
            (item.surface, item.name) for item in REGISTRATIONS
        ]
        assert {item["operation"] for item in report["kernels"]} == set(OPERATIONS)


def test_plugin_serves_here(runs) -> None:
    report = json.loads(runs["here"].stdout)
    assert report["problems"] == []
    assert report["served_by_plugin"]
    assert all(item["ours"] and item["error"] is None for item in report["registrations"])
    assert all(item["chosen"] for item in report["kernels"])
    assert report["changed_defaults"] == []  # nothing is compiled on a CPU
    assert runs["here"].returncode == 0
    assert "already registered" not in runs["here"].stderr


def test_plugin_left_out_by_vllm_plugins(runs) -> None:
    output = runs["left out"].stdout
    assert runs["left out"].returncode == 1
    assert "VLLM_PLUGINS= keeps vLLM from loading vllm_dsv32; unset it or add" in output
    assert "2. " not in output.partition("Problems")[2], "one cause, one problem"
    assert output.count("NOT OURS") == len(REGISTRATIONS)
    assert output.rstrip().endswith("Verdict: `vllm serve` DOES NOT USE vllm-dsv32 for DeepSeek-V3.2 here.")


def test_plugin_bypassed_by_rust_frontend_and_another_plugin(runs) -> None:
    report = json.loads(runs["bypassed"].stdout)
    assert runs["bypassed"].returncode == 1
    assert not report["served_by_plugin"]
    [frontend, parser] = report["problems"]
    assert "VLLM_USE_RUST_FRONTEND is set" in frontend
    assert "tool_parser deepseek_v32 belongs to other_plugin:OtherParser, of another plugin" in parser
    assert [item["owner"] for item in report["registrations"] if not item["ours"]] == ["other_plugin:OtherParser"]


def test_kernels_that_were_not_built_are_named(monkeypatch, tmp_path) -> None:
    """On the GPU that they are for; their place is taken."""
    reason = cuda_library.refusal(tmp_path / cuda_library.LIBRARY_NAME)
    monkeypatch.setattr(cuda_library, "refusal", lambda: reason)
    here = doctor.PlatformReport(
        name="CudaPlatform", device_type="cuda", device_name="NVIDIA H200", capability=(9, 0)
    )
    kernels = {(item["operation"], item["cache_format"]): item for item in doctor._kernels(here)}
    for operation, instead in (("topk_select", "triton"), ("sparse_mla", "gluon")):
        item = kernels[operation, "fp8_ds_mla"]
        assert item["chosen"] == instead
        assert "which was not built; in a checkout, python csrc/build.py" in item["implementations"]["cuda"]


def test_text_shows_refusals_and_groups_equal_answers() -> None:
    both = {
        "operation": "sparse_mla",
        "chosen": "reference",
        "implementations": {"reference": None, "peer": None, "other_peer": "takes cats, got dogs"},
        "by_name_only": ["peer", "other_peer"],
    }
    report = doctor.Report(
        versions={"vllm": "0.32.0"},
        tested_with=">=0.32,<0.34",
        platform=doctor.PlatformReport(
            name="CudaPlatform", device_type="cuda", device_name="Some GPU", capability=(9, 0)
        ),
        registrations=[],
        kernels=[
            doctor.KernelReport(cache_format="auto", **both),
            doctor.KernelReport(cache_format="fp8_ds_mla", **both),
            doctor.KernelReport(
                operation="topk_select",
                cache_format="auto",
                chosen=None,
                implementations={"fast": "takes topk 512, got 2048"},
                by_name_only=[],
            ),
        ],
        changed_defaults=[
            doctor.ChangedDefaultReport(
                setting="SOME_SETTING", value="0", reason="it takes long", undo="SOME_SETTING=1"
            )
        ],
        problems=["something is amiss; mend it"],
        served_by_plugin=False,
    )
    text = doctor.render(report)
    assert "Some GPU, compute capability 9.0" in text
    assert "auto, fp8_ds_mla" in text
    assert "not fast: takes topk 512, got 2048" in text
    assert text.count("by name: ") == text.count("by name: peer") == 1
    assert "SOME_SETTING = 0: it takes long; undone by SOME_SETTING=1" in text
    assert "  1. something is amiss; mend it\nVerdict: `vllm serve` DOES NOT USE" in text
