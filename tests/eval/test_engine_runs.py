"""What the comparisons of both sides are made of; the engines themselves need a GPU."""

import argparse
import asyncio
import json
import math
import tempfile
from pathlib import Path

import engine_agreement
import engine_soak
import httpx
import pytest
import torch
from engine_runs import reduced_model
from engine_runs.sides import IN_TREE, PLUGIN, Child, add_child_options, visible_gpus
from engine_soak import Answer
from results_file import System

from server.process import serve
from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, write_checkpoint

CHILD = """
import json, os, sys, time
sys.path.insert(0, {path!r})
from engine_runs.sides import say_ready_and_wait
names = ("CUDA_VISIBLE_DEVICES", "VLLM_PLUGINS", "VLLM_DEEP_GEMM_WARMUP")
print(json.dumps({{name: os.environ.get(name) for name in names}}), file=sys.stderr)
if {model!r} == "plugin":
    sys.modules["vllm_dsv32.model"] = sys  # as if vLLM had imported it
{before}
say_ready_and_wait()
{after}
"""


def child(tmp_path, side, before="", after="", model=None, timeout=600):
    script = tmp_path / "child.py"
    path = str(Path(engine_soak.__file__).parent)
    script.write_text(CHILD.format(path=path, before=before, after=after, model=model or side))
    return Child.start("the child", side, "5", [str(script)], tmp_path / "log", timeout)


@pytest.mark.parametrize("inherited", [None, "", "another"])
@pytest.mark.parametrize(("side", "plugins", "warmup"), [(PLUGIN, "vllm_dsv32", None), (IN_TREE, "", "skip")])
def test_a_side_has_its_environment(tmp_path, monkeypatch, side, plugins, warmup, inherited):
    for name in ("VLLM_PLUGINS", "VLLM_DEEP_GEMM_WARMUP"):
        monkeypatch.delenv(name, raising=False)
    if inherited is not None:
        monkeypatch.setenv("VLLM_PLUGINS", inherited)
    started = child(tmp_path, side)
    started.wait_until_ready()
    assert started.process.poll() is None, "it must wait"
    started.go()
    started.wait()
    seen = json.loads((tmp_path / "log").read_text())
    assert seen == {"CUDA_VISIBLE_DEVICES": "5", "VLLM_PLUGINS": plugins, "VLLM_DEEP_GEMM_WARMUP": warmup}


def test_a_side_that_fails_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="the child ended with status 3 before it was ready"):
        child(tmp_path, PLUGIN, before="sys.exit(3)").wait_until_ready()
    late = child(tmp_path, PLUGIN, after="sys.exit(4)")
    late.wait_until_ready()
    late.go()
    with pytest.raises(RuntimeError, match="the child ended with status 4"):
        late.wait()


@pytest.mark.parametrize(("side", "model"), [(PLUGIN, IN_TREE), (IN_TREE, PLUGIN)])
def test_a_side_that_runs_the_others_model_is_refused(tmp_path, side, model):
    started = child(tmp_path, side, model=model)
    with pytest.raises(RuntimeError, match=f"the child runs the {model} model, not that of its side"):
        started.wait_until_ready()
    assert started.process.wait()


def test_a_side_that_hangs_is_killed(tmp_path):
    late = child(tmp_path, PLUGIN, before="time.sleep(600)", timeout=1)
    with pytest.raises(RuntimeError, match=r"the child was not ready within 1 s and was killed; see .*log"):
        late.wait_until_ready()
    assert late.process.wait()
    stuck = child(tmp_path, PLUGIN, after="time.sleep(600)")
    stuck.wait_until_ready()
    stuck.go()
    stuck.timeout = 1
    with pytest.raises(RuntimeError, match="the child was not done within 1 s and was killed"):
        stuck.wait()
    assert stuck.process.wait()


def test_lines_that_nobody_reads_yet_do_not_stop_a_side(tmp_path):
    """A pipe holds 64 KiB."""
    said = tmp_path / "said"
    started = child(tmp_path, PLUGIN, after=f"print(1000 * ('x' * 999 + chr(10))); open({str(said)!r}, 'w')")
    started.wait_until_ready()
    started.go()
    assert started.process.wait(timeout=600) == 0
    assert said.exists()
    lines = []
    started.wait(lines.append)
    assert len(lines) == 1001


@pytest.mark.parametrize(
    ("visible", "listed", "gpus"),
    [
        ("3, 5", "", ["3", "5"]),
        (
            None,
            "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA H200 (UUID: 2)",
            ["0", "1"],
        ),
        ("", "GPU 0: NVIDIA H200", "CUDA_VISIBLE_DEVICES is ''"),
        ("-1", "GPU 0: NVIDIA H200", "CUDA_VISIBLE_DEVICES is '-1'"),
        (None, "", "nvidia-smi lists none"),
        (None, None, "nvidia-smi is not installed"),
    ],
)
def test_visible_gpus(tmp_path, monkeypatch, visible, listed, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("PATH", str(tmp_path))
    if listed is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listed}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    if isinstance(gpus, list):
        assert visible_gpus() == gpus
    else:
        with pytest.raises(SystemExit, match=f"needs an NVIDIA GPU, and there is none: {gpus}"):
            visible_gpus()


def test_the_timeout_of_a_side_is_an_option():
    parser = argparse.ArgumentParser()
    add_child_options(parser)
    assert parser.parse_args([]).timeout == 7200
    assert parser.parse_args(["--timeout", "60"]).timeout == 60


def test_a_side_ends_with_its_parent(tmp_path):
    left = child(tmp_path, PLUGIN, after="print('it went on', file=sys.stderr)")
    left.wait_until_ready()
    left.process.stdin.close()
    assert left.process.wait(timeout=60) == 1
    log = (tmp_path / "log").read_text()
    assert "ended before it said go" in log
    assert "it went on" not in log


def test_the_reduced_model_has_the_published_widths(tmp_path):
    reduced_model.write_reduced_config(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    published = {
        "hidden_size": 7168,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 2048,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
    }
    assert {name: config[name] for name in published} == published
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["num_attention_heads"] * 8 == 128


def test_differences_of_distributions():
    a = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    same = engine_agreement.difference(a, a)
    assert same == {"mean_kl": 0, "worst_kl": 0, "median_logprob_difference": 0, "top1_agreement": 1}
    b = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    other = engine_agreement.difference(a, b)
    assert other["top1_agreement"] == 0.5
    assert other["worst_kl"] == pytest.approx(0.25 * 0.6931472)
    assert other["mean_kl"] == pytest.approx(other["worst_kl"] / 2)
    impossible = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert engine_agreement.difference(impossible, impossible)["mean_kl"] == 0
    assert math.isnan(engine_agreement.difference(a, a * torch.nan)["mean_kl"])
    assert math.isnan(engine_agreement.difference(a * torch.nan, a)["mean_kl"])


SHARES = {"plugin-fp8": 0.52, "in-tree-fp8": 0.51}
"""Of the first of two tokens, so that each side's caches differ; half in all other runs."""


@pytest.mark.parametrize(
    ("failing", "shares", "missed"),
    [
        (None, SHARES, []),
        (
            None,
            SHARES | {"plugin-auto-mtp": 0.54},
            ["mean KL, plugin auto mtp and in-tree auto mtp, 64 tokens"],
        ),
        (
            None,
            {"plugin-auto": math.nan},
            [
                "mean KL, plugin auto and in-tree auto, 64 tokens",
                *(
                    f"mean KL, plugin {name} and in-tree {name}, 64 tokens"
                    for name in ("auto mtp", "fp8", "fp8 mtp")
                ),
            ],
        ),
        ("in-tree-fp8", SHARES, ["failed runs"]),
    ],
)
def test_agreement_is_held_to_what_the_caches_differ_by(tmp_path, monkeypatch, capsys, failing, shares, missed):
    steps = []

    class Run:
        def __init__(self, name, command):
            self.name, self.out = name, command[command.index("--record") + 1]
            steps.append("start")

        def wait_until_ready(self):
            if self.name == failing:
                raise RuntimeError(f"{self.name} ended")

        def go(self):
            steps.append("go")
            share = shares.get(self.name, 0.5)
            torch.save({64: torch.tensor([[share, 1 - share]]).log()}, self.out)

        def wait(self):
            steps.append("wait")

    class Start:
        @staticmethod
        def start(name, side, gpu, command, log, timeout):
            assert (log, timeout) == (tmp_path / f"out.{name}.log", 7200)
            return Run(name, command)

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    monkeypatch.setattr(engine_agreement, "Child", Start)
    monkeypatch.setattr(engine_agreement, "visible_gpus", lambda: ["0", "1"])
    out = tmp_path / "out.json"
    arguments = ["--out", str(out), "--model", str(tmp_path), "--contexts", "64"]
    assert engine_agreement.main(arguments) == int(bool(missed))
    assert list(temporary.iterdir()) == []
    if failing is None:
        assert steps == ["start", "start", "go", "go", "wait", "wait"] * 4, "no GPU waits for another"
    result = json.loads(out.read_text())
    assert [figure["name"] for figure in result["figures"] if figure["passed"] is False] == missed
    assert result["passed"] is not missed
    assert result["system"]["device"]
    assert {"vllm-dsv32", "vllm", "torch"} <= result["system"]["versions"].keys()
    assert "is a goal of this project" in out.with_suffix(".md").read_text()
    pairs = [(row["one"], row["other"]) for row in result["tables"]["Differences"]]
    assert (("plugin fp8", "in-tree fp8") in pairs) == (failing is None)
    assert ("plugin auto", "in-tree auto") in pairs
    marks = {figure["name"]: figure["pass_mark"] for figure in result["figures"]}
    assert marks["mean KL, plugin auto and plugin fp8, 64 tokens"] is None
    if shares == SHARES and failing is None:
        yardstick = -0.5 * math.log(4 * 0.52 * 0.48)
        mark = marks["mean KL, plugin fp8 and in-tree fp8, 64 tokens"]
        assert mark == pytest.approx(2 * yardstick, rel=1e-3)


def test_without_a_gpu_no_checkpoint_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(engine_agreement, "write_random_checkpoint", lambda folder: pytest.fail("it was written"))
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        engine_agreement.main(["--out", str(tmp_path / "out.json")])


def answer(*tokens: str, gap: float = 1.0) -> Answer:
    return Answer(list(tokens), [{token: -0.5, "other": -0.5 - gap} for token in tokens])


def test_answers_may_differ_where_tokens_were_nearly_tied():
    assert engine_soak.disagreement(answer("a", "b"), answer("a", "b")) is None
    assert engine_soak.disagreement(answer("a", "b", gap=0.1), answer("a", "other")) is None
    assert "1.00 nats" in engine_soak.disagreement(answer("a", "b"), answer("a", "other"))
    assert "inf nats" in engine_soak.disagreement(answer("a", "b"), answer("a", "unheard of"))
    assert "1 tokens, alone 2" in engine_soak.disagreement(answer("a", "b"), answer("a"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("soak") / "model", TinyCheckpointOptions(dtype="float32"))
    with serve(checkpoint, "--max-model-len", "1024", "--max-num-seqs", "4") as running:
        yield running


def soak(server, out, minutes=0.1) -> tuple[int, dict]:
    """The exit status and the result file."""
    arguments = ["--base-url", f"{server.url}/v1", "--server-is-here", "--out", str(out)]
    arguments += ["--minutes", str(minutes), "--streams", "6", "--max-length", "300", "--vocabulary", "250"]
    status = engine_soak.main(arguments)
    result = json.loads(out.read_text())
    assert status == int(not result["passed"])
    return status, result


def test_a_short_soak_on_a_cpu(server, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_soak, "_NUM_REQUESTS", 12)
    status, result = soak(server, tmp_path / "soak.json")
    values = {figure["name"]: figure["value"] for figure in result["figures"]}
    assert status == 0, values
    assert values["answered under load"] > 0
    assert values["cancelled under load"] > 0, "the six streams' seeds have it so from the first requests on"
    assert values["stalled or failed"] == 0
    assert values["share of pages held in the end"] == 0
    assert result["system"]["device"]
    assert all(result["system"]["versions"].values())
    assert "The pass marks are goals" in (tmp_path / "soak.md").read_text()


def test_a_wrong_answer_is_found(server, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_soak, "_NUM_REQUESTS", 4)
    ask, asked = engine_soak.ask, []

    async def ask_for_another(client, model, prompt, stop_after=None):
        asked.append(prompt)
        return await ask(client, model, prompt if len(asked) <= 4 else [7, *prompt[1:], 8], stop_after)

    monkeypatch.setattr(engine_soak, "ask", ask_for_another)
    status, result = soak(server, tmp_path / "soak.json", minutes=0.02)
    assert status == 1
    assert "nats likelier" in result["details"]["wrong"][0]
    missed = {figure["name"] for figure in result["figures"] if figure["passed"] is False}
    assert missed == {"wrong under load", "wrong afterwards"}


def test_what_a_server_still_holds_misses_the_marks():
    held = {engine_soak._RUNNING: 1.0, engine_soak._WAITING: 2.0, engine_soak._PAGES: 0.25}
    figures = engine_soak.figures_of(engine_soak.Found(answered=5, held=held))
    missed = {figure.name: figure.value for figure in figures if figure.passed is False}
    assert missed == {"requests held in the end": 3, "share of pages held in the end": 0.25}
    idle = engine_soak.Found(answered=0, held=dict.fromkeys(held, 0.0))
    missed = [figure.name for figure in engine_soak.figures_of(idle) if figure.passed is False]
    assert missed == ["answered under load"]


@pytest.fixture
def fails(monkeypatch):
    """Makes requests fail, by their number from 0 on, and the gauges; the rest is answered at once and right."""

    def make(is_failing, gauges_fail=False):
        asked = []

        async def ask(client, model, prompt, stop_after=None):
            await asyncio.sleep(0)
            asked.append(prompt)
            if is_failing(len(asked) - 1):
                raise httpx.ReadTimeout("no token")
            return answer("a")

        async def gauges(client):
            if gauges_fail:
                raise httpx.ConnectError("gone")
            return dict.fromkeys((engine_soak._RUNNING, engine_soak._WAITING, engine_soak._PAGES), 0.0)

        monkeypatch.setattr(engine_soak, "_NUM_REQUESTS", 4)
        monkeypatch.setattr(engine_soak, "ask", ask)
        monkeypatch.setattr(engine_soak, "gauges", gauges)
        monkeypatch.setattr(engine_soak, "served_system", lambda options: System("m", max_model_len=64))

    return make


@pytest.mark.parametrize(
    ("is_failing", "gauges_fail", "missed"),
    [
        (lambda number: number == 6, False, {"stalled or failed"}),
        (lambda number: number >= 2, False, {"stalled or failed", "answered under load"}),
        (lambda number: True, False, {"stalled or failed", "answered under load"}),
        (
            lambda number: False,
            True,
            {"stalled or failed", "requests held in the end", "share of pages held in the end"},
        ),
    ],
)
def test_what_fails_is_counted(fails, tmp_path, is_failing, gauges_fail, missed):
    fails(is_failing, gauges_fail)
    out = tmp_path / "soak.json"
    flags = ["--minutes", "0.02", "--streams", "3", "--out", str(out)]
    assert engine_soak.main(["--base-url", "http://127.0.0.1:1/v1", *flags]) == 1
    result = json.loads(out.read_text())
    assert {figure["name"] for figure in result["figures"] if figure["passed"] is False} == missed
    assert result["details"]["failed"]
    assert result["settings"]["max_length"] == 64 - 16


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"out of order"),
        (200, b'data: {"error": {"message": "the engine is dead", "code": 500}}\n\ndata: [DONE]\n\n'),
    ],
)
def test_errors_of_a_server_are_those_of_the_client(status, body):
    async def ask():
        transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body))
        async with httpx.AsyncClient(base_url="http://127.0.0.1:1/v1", transport=transport) as client:
            await engine_soak.ask(client, "m", [1])

    with pytest.raises(httpx.HTTPError, match=r"500|the engine is dead"):
        asyncio.run(ask())


def test_prompts_are_no_longer_than_the_server_takes():
    def max_length(asked, max_model_len):
        return engine_soak.max_length_of(argparse.Namespace(max_length=asked), max_model_len)

    assert max_length(None, 163_840) == max_length(None, None) == 60_000
    assert max_length(None, 1024) == max_length(1008, 1024) == 1008
    with pytest.raises(SystemExit, match=r"1009 tokens and 16 of its answer.*--max-model-len, 1024"):
        max_length(1009, 1024)
