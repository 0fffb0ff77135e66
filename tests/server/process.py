"""A `vllm serve` process."""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = "deepseek-v3.2-tiny"
START_SECONDS = 600
# What users of the plugin give.
FLAGS = (
    *("--tokenizer-mode", "deepseek_v32", "--tool-call-parser", "deepseek_v32"),
    *("--enable-auto-tool-choice", "--reasoning-parser", "deepseek_v3"),
)


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log: Path
    checkpoint: Path
    probe_folder: Path | None = None

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
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_until_healthy(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-4000:]}"
            try:
                if self.get("/health")[0] == 200:
                    assert self.process.poll() is None, "the server ended, and another one answers on its port"
                    return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"not healthy after {START_SECONDS} s:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=180)


@contextlib.contextmanager
def serve(checkpoint: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A healthy server of `checkpoint`, killed in the end. It logs to server.log beside the checkpoint."""
    with held_port() as port:
        server = start(port, checkpoint, flags, environment)
        try:
            server.wait_until_healthy()
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port of 127.0.0.1 that nobody gets by chance.

    It is bound and does not listen, so a server that sets SO_REUSEADDR, as vLLM's does, can still have it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def start(port: int, checkpoint: Path, flags: Sequence[str], environment: Mapping[str, str]) -> Server:
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)),
        *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *(*FLAGS, "--max-num-seqs", "8", "--enforce-eager"),
        *flags,
    ]
    log = checkpoint.parent / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"} | environment,
            start_new_session=True,
        )
    return Server(process, f"http://127.0.0.1:{port}", log, checkpoint)
