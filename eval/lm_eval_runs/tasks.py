"""lm_eval's own tasks, on the published data set or on local files in its format."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

__all__ = ["describe_file", "load_task"]

_PUBLISHED = {"gsm8k": "gsm8k/gsm8k.yaml", "aime25": "aime/aime25.yaml"}
_KEYS = {"gsm8k": ("question", "answer"), "aime25": ("problem", "answer")}


def load_task(name: str, files: Mapping[str, Path], folder: Path) -> Task:
    """The published task.

    Args:
        name: of the task, "gsm8k" or "aime25".
        files: local files of JSON lines by split ("train", "test"); if empty, lm_eval takes the data set from the
            Hugging Face hub, or from the cache of an earlier run.
        folder: for what is made of the files; it must outlive the task.

    Raises:
        SystemExit: a file is not in the data set's format, or the hub cannot be reached.
    """
    path = Path(lm_eval.tasks.__file__).parent / _PUBLISHED[name]
    if files:
        for file in files.values():
            _check(file, _KEYS[name])
        # A task file that includes the published one and replaces where the data comes from, nothing else.
        local = {
            "include": str(path),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(file.resolve()) for split, file in files.items()},
                "cache_dir": str(folder / "datasets"),
            },
        }
        path = folder / "local.yaml"
        path.write_text(yaml.safe_dump(local))
    try:
        (task,) = TaskManager(include_defaults=False).load([str(path)])["tasks"].values()
    except ConnectionError as error:
        raise SystemExit(
            f"{name}: the data set is neither in the cache nor in reach ({error}). "
            "Let this machine reach the Hugging Face hub once, or give local files (--data; see --help)."
        ) from None
    return task


def describe_file(path: Path) -> dict[str, Any]:
    """What tells a local file from another, without its folder."""
    content = path.read_bytes()
    return {"file": path.name, "lines": len(content.splitlines()), "sha256": hashlib.sha256(content).hexdigest()}


def _check(path: Path, keys: tuple[str, ...]) -> None:
    expected = f"expected a JSON object with {' and '.join(keys)}"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; {expected} in each of its lines.")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise SystemExit(f"{path}: the file is empty; {expected} in each of its lines.")
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path}, line {number}: {expected}, got no JSON ({error}).") from None
        if not (isinstance(value, dict) and set(keys) <= value.keys()):
            got = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise SystemExit(f"{path}, line {number}: {expected}, got {got}.")
