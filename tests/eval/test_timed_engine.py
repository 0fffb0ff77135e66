"""Timing of the engine: what is counted how often, on an engine whose clock is known and on a real one."""

import argparse
import json
import tempfile
import time
from types import SimpleNamespace

import engine_speed
import pytest
from engine_runs.sides import IN_TREE, PLUGIN
from engine_runs.timed_engine import (
    ENGINE_OPTIONS,
    TimedEngine,
    add_engine_options,
    as_flags,
    check_cached,
    num_calls,
)

from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, make_config


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    return parser.parse_args(arguments)


def test_long_prefills_are_timed_less_often():
    sizes = (8192, 65536, 16 * 8192, 16 * 65536)
    assert [num_calls(size, 5) for size in sizes] == [5, 5, 3, 2]
    assert [num_calls(size, 1) for size in sizes] == [1] * 4


def test_options_become_a_childs_flags():
    options = parse("--new-tokens", "8", "--linear-backend", "cutlass")
    assert parse(*as_flags(options, ENGINE_OPTIONS)) == options
    many = argparse.Namespace(contexts=[1, 2], step_tokens=3)
    assert as_flags(many, ["contexts", "step_tokens"]) == ["--contexts", "1", "2", "--step-tokens", "3"]


@pytest.mark.parametrize("name", ["--repeats", "--new-tokens", "--step-tokens"])
def test_numbers_are_above_0(name, capsys):
    with pytest.raises(SystemExit):
        parse(name, "0")
    assert "expected a number above 0, got 0" in capsys.readouterr().err


def test_a_prefix_cache_that_lost_prompts_is_reported():
    class Output:
        prompt_token_ids = range(1000)
        num_cached_tokens = 900

    check_cached([Output()] * 4, 400)
    with pytest.raises(RuntimeError, match="4 prompts of 1000 tokens: 400 are missing, and a step takes 399"):
        check_cached([Output()] * 4, 399)


class KnownClock:
    """Stands in for vLLM's LLM: a prompt token takes a millisecond unless it is cached, a step one second.

    The first call of a length compiles for 100 seconds, and each call takes one of ``jitter`` more, in turn.
    """

    def __init__(self, jitter=(0.0,)):
        self.now, self.jitter, self.calls = 0.0, jitter, []
        self.cached, self.lengths = set(), set()

    def generate(self, prompts, params, use_tqdm):
        ids = [tuple(prompt["prompt_token_ids"]) for prompt in prompts]
        new = [row for row in ids if row not in self.cached]
        self.now += self.jitter[len(self.calls) % len(self.jitter)] + 0.001 * sum(map(len, new))
        self.now += params.max_tokens - 1
        self.now += 100 * (len(ids[0]) not in self.lengths)
        self.calls.append(("fresh" if new else "cached", params.max_tokens))
        self.cached |= set(ids)
        self.lengths.add(len(ids[0]))
        return [SimpleNamespace(prompt_token_ids=row, num_cached_tokens=len(row)) for row in ids]


@pytest.fixture
def engine_on(monkeypatch, tmp_path):
    """A TimedEngine of ten decode steps whose LLM is the given one."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "vocab_size": 1_000_000}))

    def make(llm: KnownClock, repeats: int) -> TimedEngine:
        monkeypatch.setattr(time, "monotonic", lambda: llm.now)
        monkeypatch.setattr("vllm.LLM", lambda model, **arguments: llm)
        options = parse("--new-tokens", "10", "--repeats", str(repeats), "--model", str(tmp_path))
        return TimedEngine(options, cache="auto", max_model_len=64, max_num_seqs=4, num_cached_tokens=64)

    return make


def test_the_first_answer_is_part_of_the_start(engine_on):
    assert engine_on(KnownClock(), 1).first_answer_s == pytest.approx(100.063)


def test_prefill_is_the_fastest_call_after_what_compiles(engine_on):
    llm = KnownClock(jitter=(0.3, 0.1, 0.2))
    engine = engine_on(llm, 3)
    llm.calls.clear()
    timing, rows = engine.time_prefill(4, 1000)
    assert llm.calls == [("fresh", 1)] * 4
    assert (timing.seconds, timing.lowest, timing.highest) == pytest.approx((4.1, 4.1, 4.3))
    assert timing.num_calls == 3
    assert {tuple(row) for row in rows} <= llm.cached


def test_a_long_prefill_is_called_twice(engine_on):
    llm = KnownClock()
    engine = engine_on(llm, 5)
    llm.calls.clear()
    timing, _ = engine.time_prefill(8, 100_000)
    assert llm.calls == [("fresh", 1)] * 2
    assert (timing.seconds, timing.highest) == pytest.approx((800, 900)), "the first one compiled"


def test_decode_is_the_time_of_a_step_by_the_fastest_calls(engine_on):
    llm = KnownClock()
    engine = engine_on(llm, 3)
    _, rows = engine.time_prefill(4, 1000)
    llm.calls.clear()
    # Two calls that are not timed, then pairs: 10 steps of 1 s and a call of one token, and so many seconds more.
    llm.jitter = (0, 0, 1, 0, 2, 3, 6, 0)
    timing = engine.time_decode(rows)
    assert llm.calls == [("cached", 11), ("cached", 1)] * 4
    assert (timing.lowest, timing.seconds, timing.highest) == pytest.approx((0.9, 1.1, 1.6))


# engine_speed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed") / "tiny"
    folder.mkdir()
    options = TinyCheckpointOptions(num_hidden_layers=1, num_nextn_predict_layers=0)
    (folder / "config.json").write_text(json.dumps(make_config(options)))
    return folder


SHAPES = ("--contexts", "64", "128", "--batches", "1", "2", "--caches", "auto")


@pytest.mark.timeout(600)
def test_the_plugins_side_on_a_cpu(tiny, tmp_path, monkeypatch):
    """vLLM's own has no CPU kernels: its rows are the plugin's, twice as slow."""
    run_all = engine_speed.run_all

    def run_plugin(runs, gpus, model, folder, options):
        assert runs == [(IN_TREE, "auto"), (PLUGIN, "auto")]
        ours = run_all([(PLUGIN, "auto")], gpus, model, folder, options)[PLUGIN, "auto"]
        return {(PLUGIN, "auto"): ours, (IN_TREE, "auto"): slowed(ours, 2)}

    monkeypatch.setattr(engine_speed, "run_all", run_plugin)
    monkeypatch.setattr(engine_speed, "visible_gpus", lambda: [""])
    monkeypatch.setenv("VLLM_PLUGINS", "")  # a side has its own
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    out = tmp_path / "speed.json"
    flags = ("--dtype", "float32", "--step-tokens", "256", "--new-tokens", "32", "--repeats", "3")
    assert engine_speed.main(["--out", str(out), "--model", str(tiny), *SHAPES, *flags]) == 0
    assert "vllm-dsv32 serves this model" in (tmp_path / "speed.plugin-auto.log").read_text()
    assert list(temporary.iterdir()) == []
    result = json.loads(out.read_text())
    measured = result["details"]["plugin auto"]
    assert measured["first_answer_s"] > 0
    assert [(row["context"], row["batch"]) for row in measured["rows"]] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    for row in measured["rows"]:
        prefill, decode = row["prefill_call_s"], row["decode_step_s"]
        assert row["prefill_tokens_per_s"] == pytest.approx(row["batch"] * row["context"] / prefill["lowest"])
        assert row["decode_ms"] == pytest.approx(1e3 * decode["seconds"])
        assert decode["lowest"] <= decode["seconds"] <= decode["highest"]
        assert prefill["num_calls"] == decode["num_calls"] == 3
    assert result["system"]["model"] == "tiny"
    assert "--linear-backend auto" in result["system"]["flags"]
    assert result["settings"]["new_tokens"] == 32


def slowed(result, factor):
    rows = [
        row
        | {
            "prefill_tokens_per_s": row["prefill_tokens_per_s"] / factor,
            "decode_ms": row["decode_ms"] * factor,
        }
        for row in result["rows"]
    ]
    return result | {"rows": rows}


@pytest.mark.parametrize(("factor", "status", "word"), [(2.0, 0, "met"), (1.0, 0, "met"), (0.99, 1, "missed")])
def test_every_ratio_is_held_to_1(tiny, tmp_path, monkeypatch, capsys, factor, status, word):
    row = {"context": 64, "batch": 1, "prefill_tokens_per_s": 2000.0, "decode_ms": 1.5}
    ours = {"first_answer_s": 10.0, "rows": [row]}
    # Only one of the two ratios is below.
    theirs = slowed(ours, factor)
    theirs["rows"][0]["prefill_tokens_per_s"] = 1000.0
    results = {(IN_TREE, "auto"): theirs, (PLUGIN, "auto"): ours}
    monkeypatch.setattr(engine_speed, "run_all", lambda *_: results)
    monkeypatch.setattr(engine_speed, "visible_gpus", lambda: ["0"])
    out = tmp_path / "speed.json"
    assert engine_speed.main(["--out", str(out), "--model", str(tiny), *SHAPES]) == status
    result = json.loads(out.read_text())
    assert result["passed"] is (status == 0)
    prefill, decode = result["figures"]
    assert (prefill["value"], prefill["passed"]) == (2.0, True)
    assert (decode["value"], decode["pass_mark"]) == (pytest.approx(factor), 1.0)
    assert capsys.readouterr().out.strip().endswith(f"({factor:.2f})   {word}")
    assert {"vllm-dsv32", "vllm", "torch"} <= result["system"]["versions"].keys()
    assert "is a goal of this project" in out.with_suffix(".md").read_text()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        engine_speed.main(["--out", str(tmp_path / "speed.json")])


def test_results_need_a_json_file(capsys):
    with pytest.raises(SystemExit):
        engine_speed.main(["--out", "speed.txt"])
    assert "expected a name that ends in .json, got speed.txt" in capsys.readouterr().err
