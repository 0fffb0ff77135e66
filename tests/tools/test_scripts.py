"""The shell scripts parse, and say what they do; running them whole takes minutes and a package index."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / path for path in ("recipes/make_env.sh", "recipes/quickstart.sh", "tests/run.sh", ".ci/run")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_at_errors(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert os.access(script, os.X_OK)
    assert "set -" in text or "exec " in text


def test_quickstart_explains_itself() -> None:
    shown = subprocess.run(["bash", ROOT / "recipes/quickstart.sh", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--keep" in shown.stdout
    refused = subprocess.run(["bash", ROOT / "recipes/quickstart.sh", "--kep"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--kep" in refused.stderr


@contextmanager
def health_server(is_healthy: Callable[[], bool]) -> Iterator[int]:
    """Another server; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if is_healthy() else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            yield other.server_port
        finally:
            other.shutdown()
            thread.join()


@pytest.fixture
def quickstart(tmp_path: Path) -> Callable[[int], subprocess.CompletedProcess[str]]:
    """Runs it with a `vllm` that ends at once, and leaves its process id in the file "started"."""
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes/quickstart.sh", tmp_path / "recipes")
    (tmp_path / "recipes/make_env.sh").write_text("")
    commands = tmp_path / ".venv/bin"
    commands.mkdir(parents=True)
    vllm = commands / "vllm"
    vllm.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/begun && mv {tmp_path}/begun {tmp_path}/started\n")
    vllm.chmod(0o755)
    python = commands / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    def run(port: int) -> subprocess.CompletedProcess[str]:
        command = ["bash", tmp_path / "recipes/quickstart.sh", "--port", str(port)]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

    return run


def test_quickstart_refuses_a_port_where_something_answers(quickstart, tmp_path: Path) -> None:
    with health_server(lambda: True) as port:
        refused = quickstart(port)
    assert refused.returncode == 1
    assert f"quickstart: http://127.0.0.1:{port} answers already" in refused.stderr
    assert not (tmp_path / "started").exists()


def test_quickstart_takes_no_other_server_for_its_own(quickstart, tmp_path: Path) -> None:
    started, asked = tmp_path / "started", itertools.count()

    def own_has_ended() -> bool:
        if next(asked) == 0:  # before the start
            return False
        while not started.exists() or Path(f"/proc/{started.read_text().strip()}").exists():
            time.sleep(0.01)
        return True

    with health_server(own_has_ended) as port:
        failed = quickstart(port)
    assert failed.returncode == 1
    assert "quickstart: the server ended before it was ready" in failed.stderr
    assert "Ready" not in failed.stdout


def test_make_env_refuses_a_python_that_does_not_suit(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = subprocess.run(
        ["bash", ROOT / "recipes/make_env.sh"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(old)},
    )
    assert refused.returncode == 1
    assert f"PYTHON={old} is not a Python 3.11 or 3.12" in refused.stderr
