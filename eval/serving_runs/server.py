"""A server that an evaluation starts itself, with the plugin or with vLLM's own implementation."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import requests
from engine_runs.sides import IN_TREE, PLUGIN

__all__ = ["ServerError", "running"]

_SAID_BY_PLUGIN = "vllm-dsv32 serves this model"
_STOP_SECONDS = 60


class ServerError(Exception):
    """A server did not come up, or is not the one that was meant."""


@contextmanager
def running(command: str, side: str, base_url: str, log: Path, *, start_timeout: float) -> Iterator[None]:
    """Start a server, wait until it is healthy, and stop it in the end, also where SIGTERM ends this process.

    From then on this process and its children reach the server's host without a proxy.

    Args:
        command: as for a shell, such as ``vllm serve DIR --port 8000``.
        side: ``PLUGIN``, or ``IN_TREE``: the same command without plugins.
        base_url: that the command serves on, such as ``http://127.0.0.1:8000/v1``.
        log: where its output goes.
        start_timeout: seconds.

    Raises:
        ServerError: something answers there already, it ends or is not healthy in time, or the side is not the one.
    """
    _reach_without_proxy(urlsplit(base_url).hostname or "")
    health = f"{base_url.rstrip('/').removesuffix('/v1')}/health"
    if _is_healthy(health):
        raise ServerError(
            f"{health} answers already: stop that server, or give --base-url and --serve another port"
        )
    environment = os.environ | ({"VLLM_PLUGINS": ""} if side == IN_TREE else {})
    with log.open("wb") as output:
        process = subprocess.Popen(
            shlex.split(command), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    handler = signal.signal(signal.SIGTERM, _end)
    try:
        _wait(process, health, side, log, start_timeout)
        if (_SAID_BY_PLUGIN in log.read_text(errors="replace")) != (side == PLUGIN):
            raise ServerError(
                f"the {side} server {'does not use' if side == PLUGIN else 'uses'} the plugin; see {log}"
            )
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would leave what is left of the server
        _stop(process)
        signal.signal(signal.SIGTERM, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """Runs what is to run in the end; the signal's default does not."""
    raise SystemExit(128 + number)


def _reach_without_proxy(host: str) -> None:
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{hosts},{host}" if hosts else host  # goes before NO_PROXY


def _wait(process: subprocess.Popen[bytes], health: str, side: str, log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not _is_healthy(health):
        if process.poll() is not None:
            raise ServerError(f"the {side} server ended with status {process.returncode} while starting; see {log}")
        if time.monotonic() > end:
            raise ServerError(f"the {side} server was not ready on {health} within {timeout:.0f} s; see {log}")
        time.sleep(1)


def _is_healthy(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and what it started, which has its process group."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
