"""The servers that the tests of this folder share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from replay import checkpoint as replay
from server.process import MODEL, Server, serve
from server.replies import REPLIES
from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, write_checkpoint

__all__ = ["MAX_MODEL_LEN", "MODEL", "Server", "serve_replies"]

MAX_MODEL_LEN = 4096


def python_path(folder: Path) -> str:
    """PYTHONPATH of a server: `folder`, and what ours says; so it runs the plugin that the tests import."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """One over a small random checkpoint, with a probe in each of its processes.

    Its greedy answers are compared. A cached prefix changes the order of sums, and bfloat16 ties of tokens are
    common: hence the two flags.
    """
    folder = tmp_path_factory.mktemp("server")
    checkpoint = write_checkpoint(folder / "checkpoint", TinyCheckpointOptions())
    probe = folder / "probe"
    distribution = probe / "dsv32_probe-1.dist-info"
    distribution.mkdir(parents=True)
    (probe / "dsv32_probe.py").write_text((Path(__file__).parent / "probe.py").read_text())
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv32-probe\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text("[vllm.general_plugins]\nprobe = dsv32_probe:register\n")
    notes = folder / "notes"
    notes.mkdir()
    environment = {
        "PYTHONPATH": python_path(probe),
        "PROBE_FOLDER": str(notes),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    flags = ("--max-model-len", str(MAX_MODEL_LEN), "--dtype", "float32", "--no-enable-prefix-caching")
    with serve(checkpoint, *flags, **environment) as running:
        running.probe_folder = notes
        yield running


def serve_replies(folder: Path, *flags: str):
    """A server that says what is written in `server.replies`."""
    return serve(
        replay.write_replay_checkpoint(folder / "checkpoint", REPLIES),
        *("--max-model-len", "8192", *replay.FLAGS),
        # The worker lives in the engine's process: a third of the start-up time is saved.
        *("--distributed-executor-backend", "uni"),
        *flags,
        PYTHONPATH=python_path(replay.MODULE_PATH),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        NUMBA_NUM_THREADS="1",  # of the prompt lookup; on two cores its threads wait for each other
    )


@pytest.fixture(scope="session")
def replay_server(tmp_path_factory) -> Iterator[Server]:
    """One that says what is written in `server.replies`."""
    with serve_replies(tmp_path_factory.mktemp("replay")) as running:
        yield running
