"""A real `vllm serve` process over a small random checkpoint, one for all tests of this folder."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, write_checkpoint

MODEL = "deepseek-v3.2-tiny"
MAX_MODEL_LEN = 4096
START_SECONDS = 240


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log: Path
    probe_folder: Path

    def get(self, path: str) -> tuple[int, str]:
        return self._open(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        status, text = self._open(request)
        return status, json.loads(text)

    def _open(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_until_healthy(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-4000:]}"
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"not healthy after {START_SECONDS} s:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def start(folder: Path, *flags: str) -> Server:
    """`vllm serve` with the flags that users give, and a probe in each of its processes."""
    checkpoint = write_checkpoint(folder / "checkpoint", TinyCheckpointOptions())
    probe = folder / "probe"
    distribution = probe / "dsv32_probe-1.dist-info"
    distribution.mkdir(parents=True)
    (probe / "dsv32_probe.py").write_text((Path(__file__).parent / "probe.py").read_text())
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv32-probe\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text("[vllm.general_plugins]\nprobe = dsv32_probe:register\n")
    notes = folder / "notes"
    notes.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)),
        *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--tokenizer-mode", "deepseek_v32", "--tool-call-parser", "deepseek_v32"),
        *("--enable-auto-tool-choice", "--reasoning-parser", "deepseek_v3"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--enforce-eager"),
        *flags,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(probe),
        "PROBE_FOLDER": str(notes),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return Server(process, f"http://127.0.0.1:{port}", log, notes)


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    running = start(tmp_path_factory.mktemp("server"))
    try:
        running.wait_until_healthy()
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
