"""Child processes that run one side of a comparison, each on a GPU of its own if there are enough."""

import argparse
import atexit
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

__all__ = ["IN_TREE", "PLUGIN", "Child", "add_child_options", "say_ready_and_wait", "visible_gpus"]

PLUGIN, IN_TREE = "plugin", "in-tree"

_READY = "READY"
_ENVIRONMENT = {
    PLUGIN: {"VLLM_PLUGINS": "vllm_dsv32"},
    # Two things are left out that only make vLLM's start longer: the compilation of GEMMs that are not used, and
    # that of FlashInfer's sampler.
    IN_TREE: {"VLLM_PLUGINS": "", "VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0"},
}
"""What is set for a side, whatever the parent's environment has."""


def add_child_options(parser: argparse.ArgumentParser) -> None:
    """Add --timeout, of children."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=7200,
        metavar="SECONDS",
        help="for the start of a side, and again for its run; one that takes longer is killed (default: 7200)",
    )


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one of them.

    Raises:
        SystemExit: there is none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [gpu for gpu in map(str.strip, visible.split(",")) if gpu not in ("", "-1")]
        found = f"CUDA_VISIBLE_DEVICES is {visible!r}"
    else:
        command = shutil.which("nvidia-smi")
        listed = subprocess.run([command, "--list-gpus"], capture_output=True, text=True).stdout if command else ""
        # A GPU that is divided has a line for each instance below its own.
        num = sum(line.startswith("GPU ") for line in listed.splitlines())
        gpus = [str(index) for index in range(num)]
        found = "nvidia-smi lists none" if command else "nvidia-smi is not installed"
    if not gpus:
        raise SystemExit(f"This needs an NVIDIA GPU, and there is none: {found}.")
    return gpus


@dataclass
class Child:
    """A process that gets ready, says so, and goes on when told to, so that several can be timed at once.

    It does not outlive the process that started it.
    """

    name: str
    side: str
    process: subprocess.Popen[str]
    log: Path
    timeout: float
    _printed: queue.Queue[str | None] = field(default_factory=queue.Queue, init=False)
    """Its lines; None for the end."""

    @classmethod
    def start(
        cls,
        name: str,
        side: str,
        gpu: str,
        arguments: Sequence[str],
        log: Path,
        timeout: float,
        variables: Mapping[str, str] | None = None,
    ) -> "Child":
        """Start a script of this folder's parent.

        Args:
            name: for messages.
            side: ``PLUGIN``: no other plugin is loaded; or ``IN_TREE``: none is.
            gpu: as in CUDA_VISIBLE_DEVICES.
            arguments: of the script, its path first.
            log: where its output goes, vLLM's included; its folder is made.
            timeout: seconds for its start, and again for its run.
            variables: of its environment, whatever the parent's has.
        """
        environment = os.environ | (variables or {}) | _ENVIRONMENT[side]
        # In one process, which has the model then; stdout is for what the script itself says.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment | {"CUDA_VISIBLE_DEVICES": gpu},
                text=True,
            )
        atexit.register(process.kill)
        child = cls(name, side, process, log, timeout)
        Thread(target=child._read, daemon=True).start()
        return child

    def wait_until_ready(self) -> None:
        """Raises: RuntimeError: it ended without being ready, took too long, or runs the other side's model."""
        for line in self._lines("ready"):
            word, _, side = line.strip().partition(" ")
            if word != _READY:
                continue
            if side != self.side:
                self.process.kill()
                raise RuntimeError(f"{self.name} runs the {side} model, not that of its side; see {self.log}")
            return
        raise RuntimeError(
            f"{self.name} ended with status {self.process.wait()} before it was ready; see {self.log}"
        )

    def go(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has failed since: wait() says so
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def wait(self, on_line: Callable[[str], object] = lambda line: None) -> None:
        """Until it ended; ``on_line`` is called with each line that it prints.

        Raises:
            RuntimeError: the process failed, or took too long.
        """
        for line in self._lines("done"):
            on_line(line)
        if self.process.wait():
            raise RuntimeError(f"{self.name} ended with status {self.process.returncode}; see {self.log}")

    def _lines(self, goal: str) -> Iterator[str]:
        end = time.monotonic() + self.timeout
        while True:
            try:
                line = self._printed.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.process.kill()
                raise RuntimeError(
                    f"{self.name} was not {goal} within {self.timeout:.0f} s and was killed; see {self.log}"
                ) from None
            if line is None:
                return
            yield line

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._printed.put(line)
        self._printed.put(None)


def say_ready_and_wait() -> None:
    """In the child, which has made its engine: tell whose model it is, and wait.

    Raises:
        SystemExit: the parent ended; the GPU is free for whoever comes next.
    """
    from vllm_dsv32.plugin import REGISTRATIONS

    # vLLM imports the module of the model that it runs, and of no other.
    ours = {registration.module for registration in REGISTRATIONS if registration.surface == "model"}
    print(_READY, PLUGIN if ours & sys.modules.keys() else IN_TREE, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the process that started this one ended before it said go")
