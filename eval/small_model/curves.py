"""The curves of a training run: losses, and how much of dense attention the selection keeps."""

import json
from pathlib import Path
from typing import Any

__all__ = ["plot"]

_STAGE_COLOURS = {"dense": "tab:blue", "warm-up": "tab:orange", "sparse": "tab:green"}


def plot(log: Path, out: Path) -> None:
    """Draw loss.png and recall.png.

    Args:
        log: log.jsonl of the training.
        out: folder to write to.
    """
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [entry for entry in entries if "loss" in entry]
    _draw(
        out / "loss.png",
        "Language loss",
        {task: [e for e in losses if e["task"] == task] for task in sorted({e["task"] for e in losses})},
        "loss",
        "log",
    )
    # Of the other tasks hardly a text is longer than the selection.
    recalls = [entry for entry in losses if "recall" in entry and entry["task"] == "needle"]
    _draw(
        out / "recall.png", "Share of dense attention inside the selection", {"needle": recalls}, "recall", "linear"
    )


def _draw(path: Path, title: str, series: dict[str, list[dict[str, Any]]], key: str, scale: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    entries = [entry for values in series.values() for entry in values]
    for stage, colour in _STAGE_COLOURS.items():
        steps = [entry["step"] for entry in entries if entry["stage"] == stage]
        if steps:
            axes.axvspan(min(steps), max(steps), color=colour, alpha=0.08, label=f"{stage} stage")
    for name, values in series.items():
        steps = [entry["step"] for entry in values]
        axes.plot(steps, _smooth([entry[key] for entry in values]), label=name, linewidth=1)
    axes.set(title=title, xlabel="step", ylabel=key, yscale=scale)
    if entries:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: list[float], weight: float = 0.8) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else weight * smoothed[-1] + (1 - weight) * value)
    return smoothed
