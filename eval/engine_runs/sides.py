"""Child processes that run one side of a comparison, each on a GPU of its own if there are enough."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["IN_TREE", "PLUGIN", "Child", "say_ready_and_wait", "visible_gpus"]

PLUGIN, IN_TREE = "plugin", "in-tree"

_READY = "READY"


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    return [str(index) for index in range(len(listed.stdout.splitlines()))]


@dataclass
class Child:
    """A process that gets ready, says so, and goes on when told to, so that several can be timed at once."""

    name: str
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, name: str, side: str, gpu: str, arguments: Sequence[str], log: Path) -> "Child":
        """Start a script of this folder's parent.

        Args:
            name: for messages.
            side: ``PLUGIN``, or ``IN_TREE``: no plugin is loaded, and two things are left out that only make vLLM's
                start longer: the compilation of GEMMs that are not used, and that of FlashInfer's sampler.
            gpu: as in CUDA_VISIBLE_DEVICES.
            arguments: of the script, its path first.
            log: where its output goes.
        """
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if side == IN_TREE:
            environment |= {"VLLM_PLUGINS": "", "VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment,
            text=True,
        )
        return cls(name, process)

    def wait_until_ready(self) -> None:
        """Raises: RuntimeError: the process ended without being ready."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == _READY:
                return
        raise RuntimeError(f"{self.name} ended with status {self.process.wait()} before it was ready; see its log")

    def go(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def wait(self, on_line: Callable[[str], object] = lambda line: None) -> None:
        """Until it ended; ``on_line`` is called with each line that it prints.

        Raises:
            RuntimeError: the process failed.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            on_line(line)
        if self.process.wait():
            raise RuntimeError(f"{self.name} ended with status {self.process.returncode}; see its log")


def say_ready_and_wait() -> None:
    """In the child.

    Raises:
        SystemExit: the parent ended; the GPU is free for whoever comes next.
    """
    print(_READY, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the process that started this one ended before it said go")
