"""Retrieval, tool calls and the serving benchmark as commands, on the small trained model through a server."""

import json
from pathlib import Path

import bench_serve
import pytest
import retrieval
import tool_calls

from server.process import MODEL, serve

CHECKPOINT = Path(__file__).parents[2] / "eval" / "small_model" / "checkpoint"
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    model = tmp_path_factory.mktemp("small") / "model"
    model.symlink_to(CHECKPOINT)
    with serve(model, "--dtype", "float32", "--max-model-len", "2048") as server:
        yield f"{server.url}/v1"


def run(evaluation, url: str, out: Path, *flags: str) -> tuple[int, dict]:
    """The exit status and the result file."""
    status = evaluation.main(["--base-url", url, "--out", str(out), "--server-device", "a CPU", *flags])
    result = json.loads(out.read_text())
    assert result["system"]["model"] == MODEL
    assert result["system"]["versions"]["vllm"].startswith("0.")
    assert result["system"]["device"] == "a CPU"
    assert "a CPU" in out.with_suffix(".md").read_text()
    assert status == int(not result["passed"])
    return status, result


def test_retrieval(url, tmp_path):
    flags = ("--text", "records", "--max-tokens", "64", "--lengths", "512", "1K", "--texts", "3")
    status, result = run(retrieval, url, tmp_path / "right.json", *flags)
    assert status == 0
    assert [figure["name"] for figure in result["figures"]] == ["right at 512", "right at 1K"]
    assert [row["texts"] for row in result["tables"]["By length"]] == [3, 3]


def test_retrieval_below_the_pass_mark(url, tmp_path):
    # Three tokens do not hold a code.
    flags = ("--text", "records", "--max-tokens", "3", "--lengths", "512", "--texts", "1")
    status, result = run(retrieval, url, tmp_path / "wrong.json", *flags)
    assert status == 1
    assert result["figures"][0]["value"] == 0
    assert len(result["details"]["wrong"]) == 1


def test_tool_calls(url, tmp_path):
    status, result = run(
        tool_calls, url, tmp_path / "calls.json", "--kinds", "loop", "--cases", "1", "--max-tokens", "200"
    )
    assert status == 0
    right, valid_json, valid = result["figures"]
    assert (right["value"], right["samples"]) == (1, 4)
    assert (valid_json["value"], valid_json["samples"]) == (1, 8)
    assert valid["value"] == 1
    assert {row["mode"] for row in result["tables"]["By kind"]} == {
        *("whole, thinking", "whole, not thinking", "streamed, thinking", "streamed, not thinking")
    }


def test_tool_calls_that_the_small_model_was_not_trained_on(url, tmp_path):
    # It knows two tools, and always begins with the date.
    status, result = run(
        tool_calls, url, tmp_path / "others.json", "--kinds", "none", "--cases", "1", "--max-tokens", "64"
    )
    assert status == 1
    assert result["figures"][0]["value"] < 1
    assert result["details"]["wrong"][0]["complaint"]


def test_bench_serve(url, tmp_path):
    load = ("--input-tokens", "64", "--output-tokens", "4", "--prompts", "3")
    flags = ("--bench-flags", f"--tokenizer {CHECKPOINT} --disable-tqdm")
    status, result = run(bench_serve, url, tmp_path / "bench.json", *load, *flags)
    assert status == 0
    values = {figure["name"]: figure["value"] for figure in result["figures"]}
    assert values["successful requests"] == 3
    assert values["total generated tokens"] == 12
    assert values["output token throughput"] == pytest.approx(12 / values["benchmark duration"])
    assert "--random-input-len 64" in result["settings"]["command"]
    assert str(tmp_path) not in result["settings"]["command"]
