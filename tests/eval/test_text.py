"""The two comparisons of the text side run, and write the JSON that their readers rely on. No timing is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EVAL = Path(__file__).parents[2] / "eval"


def run(script, path, *arguments):
    command = [sys.executable, EVAL / script, "--json", path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    return run("text_speed.py", tmp_path_factory.mktemp("speed") / "speed.json", "--tiny")


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    return run("text_differences.py", tmp_path_factory.mktemp("differences") / "differences.json", "--every", "5")


@pytest.mark.parametrize("report", ["speed", "differences"])
def test_environment(report, request):
    text, values = request.getfixturevalue(report)
    assert {"python", "vllm", "vllm-dsv32"} <= values["versions"].keys()
    assert values["host"].keys() == {"cpu", "machine", "system"}
    assert "/" not in json.dumps([values["versions"], values["host"]]), "a path"
    assert values["versions"]["vllm"] in text


def test_encoding_speed(speed):
    encoding = speed[1]["encoding"]
    assert [row["messages"] for row in encoding["sizes"]] == [3, 6, 12, 25, 50, 100]
    for row in encoding["sizes"]:
        assert row.keys() == {"messages", "bytes", "plugin", "in-tree", "ratio"}
        assert row["ratio"] == row["in-tree"] / row["plugin"]
    assert encoding["exponent"].keys() == {"plugin", "in-tree"}


@pytest.mark.parametrize("kind", ["tool_streaming", "reasoning_streaming"])
def test_streaming_speed(speed, kind):
    rows = speed[1][kind]
    assert {row["tokens_per_delta"] for row in rows} == {1, 4}
    for row in rows:
        assert row.keys() == {"reply", "tokens_per_delta", "tokens", "plugin", "in-tree", "ratio"}
        for side in ("plugin", "in-tree"):
            assert row[side].keys() == {"tokens_per_second", "us_per_token_by_quarter", "largest_piece"}
            assert len(row[side]["us_per_token_by_quarter"]) == 4


@pytest.mark.parametrize("kind", ["histories", "refusals", "replies"])
def test_differences(differences, kind):
    text, values = differences
    section = values[kind]
    assert section["plugin_as_expected"] == section["inputs"], "tests/serving says more"
    assert section["in_tree_as_expected"] == section["inputs"] - len(section["differences"])
    names = {difference["name"] for difference in section["differences"]}
    assert {name for group in section["reasons"] for name in group["inputs"]} == names
    for group in section["reasons"]:
        assert group["reason"] in text
        assert "not explained" not in group["reason"]
        assert group["example"].keys() == {"name", "reasons", "expected", "in_tree"}
        assert group["reason"] in group["example"]["reasons"]
