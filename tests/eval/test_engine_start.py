"""Time to the first answer: two starts on a CPU, of which the second finds what the first has left."""

import json

import engine_start
import pytest
from engine_runs.sides import Child

from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, make_config


@pytest.mark.timeout(600)
def test_two_starts_with_caches_of_their_own(tmp_path, monkeypatch):
    model = tmp_path / "tiny"
    model.mkdir()
    options = TinyCheckpointOptions(num_hidden_layers=1, num_nextn_predict_layers=0)
    (model / "config.json").write_text(json.dumps(make_config(options)))
    found_before = []
    start = Child.start.__func__

    def look_and_start(cls, *arguments):
        caches = arguments[-1]
        assert set(caches) == set(engine_start._CACHE_VARIABLES)
        folder = engine_start.Path(caches["VLLM_CACHE_ROOT"])
        found_before.append(sum(path.is_file() for path in folder.rglob("*")))
        return start(cls, *arguments)

    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setattr(Child, "start", classmethod(look_and_start))
    monkeypatch.setattr(engine_start, "visible_gpus", lambda: [""])
    out = tmp_path / "start.json"
    arguments = ["--out", str(out), "--model", str(model), "--cache", "auto", "--dtype", "float32"]
    status = engine_start.main(arguments)
    assert found_before[0] == 0
    assert found_before[1] > 0
    result = json.loads(out.read_text())
    assert status == int(not result["passed"])  # how fast this machine is, is not tested
    assert [figure["name"] for figure in result["figures"]] == [
        "first answer, from empty caches",
        "first answer, the next time",
    ]
    assert all(figure["value"] > 0 for figure in result["figures"])
    assert "vllm-dsv32 serves this model" in (tmp_path / "start.1.log").read_text()


@pytest.mark.parametrize(("again", "status"), [(45.0, True), (45.1, False)])
def test_each_start_has_its_mark(again, status):
    first, second = engine_start.figures_of({"from empty caches": 119.0, "the next time": again})
    assert (first.passed, second.passed) == (True, status)
