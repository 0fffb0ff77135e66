"""The serving benchmark's command, figures and comparison; tests/eval/test_served_runs.py runs it on a server."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from bench_serve import LINES, PUBLISHED_LOAD, Load, bench_command, figures_of, main, ratio_figure, table_of
from bench_serve import __file__ as bench_file
from engine_runs.sides import IN_TREE, PLUGIN
from results_file import passed
from serving_runs.server import ServerError, running
from vllm.benchmarks.serve import add_cli_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

PUBLISHED_COMMAND = """
vllm bench serve --model deepseek-ai/DeepSeek-V3.2 --dataset-name random --random-input 2048 --random-output 1024
  --request-rate 10 --num-prompt 100 --trust-remote-code
"""
PUBLISHED = {line.key: line.published for line in LINES}


def parsed(command: list[str]) -> dict:
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return vars(parser.parse_args(command[command.index("serve") + 1 :]))


def test_the_command_is_the_published_one():
    published = parsed(shlex.split(PUBLISHED_COMMAND))
    ours = parsed(bench_command("http://h:1/v1", "deepseek-ai/DeepSeek-V3.2", PUBLISHED_LOAD, Path("/d/f.json")))
    assert {name for name in ours if ours[name] != published[name]} == {
        *("base_url", "temperature", "save_result", "result_dir", "result_filename"),
        "request_id_prefix",  # random
    }
    assert ours["base_url"] == "http://h:1"
    assert ours["temperature"] == 0


def test_the_published_figures_agree_with_each_other():
    tokens = PUBLISHED["total_input_tokens"] + PUBLISHED["total_output_tokens"]
    seconds = PUBLISHED["duration"]
    assert tokens / seconds == pytest.approx(PUBLISHED["total_token_throughput"], rel=1e-4)
    assert PUBLISHED["total_output_tokens"] / seconds == pytest.approx(PUBLISHED["output_throughput"], rel=1e-4)
    assert PUBLISHED["completed"] / seconds == pytest.approx(PUBLISHED["request_throughput"], abs=0.005)
    assert PUBLISHED["total_input_tokens"] == PUBLISHED_LOAD.prompts * PUBLISHED_LOAD.input_tokens
    assert PUBLISHED["total_output_tokens"] == PUBLISHED_LOAD.prompts * PUBLISHED_LOAD.output_tokens
    for name in ("ttft", "tpot", "itl"):
        assert PUBLISHED[f"median_{name}_ms"] < PUBLISHED[f"p99_{name}_ms"]


def test_pass_marks():
    mark = PUBLISHED["output_throughput"]
    figures = figures_of(PUBLISHED, PUBLISHED_LOAD, mark)
    assert passed(figures)
    assert [figure.published for figure in figures] == [figure.value for figure in figures]
    for worse in ({"completed": 99}, {"failed": 1}, {"output_throughput": mark - 1}):
        assert not passed(figures_of(PUBLISHED | worse, PUBLISHED_LOAD, mark))
    assert passed(figures_of(PUBLISHED | {"mean_ttft_ms": 1e6}, PUBLISHED_LOAD, mark))


def test_published_figures_stand_beside_their_own_load_only():
    other = Load(prompts=4)
    assert all(figure.published is None for figure in figures_of(PUBLISHED, other, None))
    sides = {PLUGIN: PUBLISHED, IN_TREE: PUBLISHED}
    assert list(table_of(sides, PUBLISHED_LOAD)[0]) == ["figure", "unit", "published (8 x H20)", PLUGIN, IN_TREE]
    assert list(table_of(sides, other)[0]) == ["figure", "unit", PLUGIN, IN_TREE]
    assert replace(other, prompts=100) == PUBLISHED_LOAD


@pytest.mark.parametrize(("ours", "theirs", "is_passed"), [(200, 100, True), (96, 100, True), (94, 100, False)])
def test_ratio(ours, theirs, is_passed):
    figure = ratio_figure({PLUGIN: {"output_throughput": ours}, IN_TREE: {"output_throughput": theirs}})
    assert figure.value == ours / theirs
    assert figure.passed is is_passed


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(["--compare-in-tree"], "--compare-in-tree needs --serve"), (["--serve", "x"], "--serve needs --out")],
)
def test_flags_that_need_others(flags, complaint, capsys):
    with pytest.raises(SystemExit):
        main(["--base-url", "http://127.0.0.1:1/v1", *flags])
    assert complaint in capsys.readouterr().err


# Servers that are started: these say what vLLM says, and answer on /health.


@pytest.fixture
def server(tmp_path):
    """A command, its base URL and a log."""
    # Bound until the test ends, so that nobody else takes the port; the server shares it, and alone listens.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    script = tmp_path / "serve.py"
    script.write_text(
        "import http.server, os, sys\n"
        "if os.environ.get('VLLM_PLUGINS') != '': print('vllm-dsv32 serves this model', flush=True)\n"
        "open('health', 'w')\n"
        f"http.server.HTTPServer(('127.0.0.1', {port}), http.server.SimpleHTTPRequestHandler).serve_forever()\n"
    )
    yield f"env -C {tmp_path} {sys.executable} {script}", f"http://127.0.0.1:{port}/v1", tmp_path / "server.log"
    held.close()


@pytest.mark.parametrize("side", [PLUGIN, IN_TREE])
def test_a_server_runs_with_its_side_and_is_stopped(server, side, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    command, url, log = server
    health = url.replace("/v1", "/health")
    with running(command, side, url, log, start_timeout=60):
        assert requests.get(health).ok
        with (
            pytest.raises(ServerError, match="answers already"),
            running(command, side, url, log, start_timeout=60),
        ):
            pass
    with pytest.raises(requests.ConnectionError):
        requests.get(health)


def test_a_server_without_the_plugin_is_not_taken_for_one_with_it(server, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    command, url, log = server
    message = "the plugin server does not use the plugin"
    with pytest.raises(ServerError, match=message), running(command, PLUGIN, url, log, start_timeout=60):
        pass


def test_a_server_is_reached_without_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "elsewhere.example")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    command, url, log = server
    with running(command, PLUGIN, url, log, start_timeout=300):
        assert requests.get(url.replace("/v1", "/health")).ok
    assert os.environ["no_proxy"] == "elsewhere.example,127.0.0.1"


def test_a_server_ends_with_the_evaluation(server, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    command, url, log = server
    script = tmp_path / "evaluation.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(Path(bench_file).parent)!r})\n"
        "from pathlib import Path\nfrom serving_runs.server import running\n"
        f"with running({command!r}, 'plugin', {url!r}, Path({str(log)!r}), start_timeout=300):\n"
        "    print('up', flush=True)\n    time.sleep(600)\n"
    )
    evaluation = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    with evaluation:
        assert evaluation.stdout.readline() == "up\n"
        evaluation.send_signal(signal.SIGTERM)
        assert evaluation.wait() == 128 + signal.SIGTERM
    with pytest.raises(requests.ConnectionError):
        requests.get(url.replace("/v1", "/health"))


def test_a_server_that_ends_or_is_never_ready(server, monkeypatch):
    _, url, log = server
    with (
        pytest.raises(ServerError, match=r"the in-tree server ended with status 1 while starting; see .*log"),
        running("false", IN_TREE, url, log, start_timeout=60),
    ):
        pass
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            started.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    message = "was not ready"
    with pytest.raises(ServerError, match=message), running("sleep 600", PLUGIN, url, log, start_timeout=1):
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)
