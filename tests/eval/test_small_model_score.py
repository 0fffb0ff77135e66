"""What the small model's score prints, writes and exits with; the scoring itself is in test_small_checkpoint.py."""

import json

import pytest
from results_file import System

from small_model import score

CHECKPOINT = "eval/small_model/checkpoint"


@pytest.fixture
def rights(monkeypatch) -> dict[str, list[bool]]:
    found = {kind: [True] * 100 for kind in score.PASS_MARKS}
    monkeypatch.setattr(score, "score", lambda *_, **__: iter(found.items()))
    monkeypatch.setattr(score, "transformed", lambda path: None)
    monkeypatch.setattr(score, "served", lambda url, model: None)
    monkeypatch.setattr(
        score, "served_system", lambda options: System("small", {"vllm": "0.32.0"}, "1 x GPU", "-x")
    )
    return found


def test_the_results_name_what_was_scored(rights, tmp_path):
    out = tmp_path / "score.json"
    assert score.main(["--base-url", "http://127.0.0.1:1/v1", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["system"]["versions"]["vllm"] == "0.32.0"
    assert {figure["name"]: figure["pass_mark"] for figure in written["figures"]} == score.PASS_MARKS
    assert "1 x GPU" in out.with_suffix(".md").read_text()


def test_a_missed_mark_is_a_failure(rights, capsys):
    rights["needle 16K"] = [True] * 9 + [False]
    assert score.main(["--transformers", CHECKPOINT]) == 1
    assert "needle 16K      9 of   10    90.0%  below the goal of 95%" in capsys.readouterr().out


@pytest.mark.parametrize("sides", [[], ["--base-url", "http://x/v1", "--transformers", CHECKPOINT]])
def test_one_side_is_scored(rights, capsys, sides):
    with pytest.raises(SystemExit):
        score.main(sides)
    assert "expected either --base-url or --transformers" in capsys.readouterr().err
