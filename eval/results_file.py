"""Results of an evaluation: a JSON file, and beside it a Markdown page that says what was run on what.

An evaluation of a server calls ``add_server_options``, ``served_system`` and ``write_results``; one that runs an
engine in its own process calls ``local_system`` instead of the first two. Versions and device of this machine come
from ``this_machine``, for the kernels' results too.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
from this_machine import PACKAGES, installed_versions, local_device

__all__ = [
    "Figure",
    "System",
    "add_server_options",
    "json_path",
    "local_system",
    "passed",
    "served_system",
    "write_results",
]

_TIMEOUT_S = 30


@dataclass(frozen=True)
class Figure:
    """One number of a run, and what it is held to."""

    name: str
    value: float
    stderr: float | None = None
    samples: int | None = None
    unit: str = ""
    published: float | None = None
    pass_mark: float | None = None
    higher_is_better: bool = True

    @property
    def passed(self) -> bool | None:
        """None without a pass mark; not a number never passes."""
        if self.pass_mark is None:
            return None
        return self.value >= self.pass_mark if self.higher_is_better else self.value <= self.pass_mark


@dataclass(frozen=True)
class System:
    """What was evaluated; None stands for what neither the server nor an option told."""

    model: str
    versions: Mapping[str, str | None] = field(default_factory=dict)
    device: str | None = None
    flags: str | None = None
    max_model_len: int | None = None


def passed(figures: Sequence[Figure]) -> bool:
    """Whether no figure missed its pass mark."""
    return all(figure.passed is not False for figure in figures)


# What was evaluated.


def add_server_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --base-url, --model, and what a server does not tell: flags, device, versions other than vLLM's.

    Args:
        parser: of the script.
        required: whether there has to be a server.
    """
    group = parser.add_argument_group("the server", "A key, if it wants one, is read from OPENAI_API_KEY.")
    group.add_argument("--base-url", required=required, help="of the server, such as http://127.0.0.1:8000/v1")
    group.add_argument("--model", help="the name it is served under (default: the first that the server names)")
    group.add_argument(
        "--server-flags", metavar="FLAGS", help="it was started with, in one string; for the results"
    )
    place = group.add_mutually_exclusive_group()
    place.add_argument("--server-device", metavar="DEVICE", help="such as '8 x NVIDIA H200'; for the results")
    place.add_argument(
        "--server-is-here",
        action="store_true",
        help="it runs on this machine in this environment: its device and versions are taken from here",
    )
    group.add_argument(
        "--server-versions",
        nargs="+",
        default=[],
        metavar="NAME=VERSION",
        help=f"those of {', '.join(PACKAGES)} that GET /version does not tell; for the results",
    )


def served_system(options: argparse.Namespace) -> System:
    """The system behind --base-url: what the server tells, the rest from the options.

    Raises:
        SystemExit: no server answers there, it does not serve the model, or an option contradicts it.
    """
    base_url = options.base_url.rstrip("/")
    answer = _get(f"{base_url}/models")
    if answer.status_code == 401:
        raise SystemExit(f"{base_url}/models: the server wants a key, not what OPENAI_API_KEY is (status 401).")
    models = _json(answer)
    if models is None:
        raise SystemExit(
            f"{base_url}/models: expected a list of models, got no JSON, with status {answer.status_code}. "
            "--base-url is that of an OpenAI-compatible server with /v1 at its end, such as http://127.0.0.1:8000/v1."
        )
    by_name = {model["id"]: model for model in models["data"]}
    if options.model not in (None, *by_name):
        raise SystemExit(f"--model {options.model}: the server has {', '.join(by_name)}. Name one of them.")
    model = by_name[options.model or next(iter(by_name))]
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    if options.server_is_here:
        versions |= installed_versions()
    versions |= dict(_name_and_version(text) for text in options.server_versions)
    told = (_json(_get(f"{base_url.removesuffix('/v1')}/version")) or {}).get("version")
    if told is not None and versions["vllm"] is not None and _public(versions["vllm"]) != _public(told):
        raise SystemExit(
            f"vllm {versions['vllm']} by the options, but the server says {told}. "
            "Leave out --server-is-here if it runs elsewhere, or correct --server-versions."
        )
    versions["vllm"] = told or versions["vllm"]
    device = local_device() if options.server_is_here else options.server_device
    return System(model["id"], versions, device, options.server_flags, model.get("max_model_len"))


def local_system(model: str, flags: str | None = None) -> System:
    """The system of an engine in this process or in a child of it.

    Args:
        model: its name, no path.
        flags: what was set on the engine.
    """
    return System(model, installed_versions(), local_device(), flags)


def _get(url: str) -> requests.Response:
    key = os.environ.get("OPENAI_API_KEY")
    try:
        return requests.get(url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=_TIMEOUT_S)
    except requests.RequestException as error:
        raise SystemExit(
            f"{url}: expected a server's answer, got {error}. Is the server up? See --base-url."
        ) from None


def _json(answer: requests.Response) -> Any:
    """None if it is an error, or something else."""
    try:
        return answer.json() if answer.ok else None
    except requests.JSONDecodeError:
        return None


def _public(number: str) -> str:
    """Without the build's label: vLLM does not always tell its own."""
    return number.partition("+")[0]


def _name_and_version(text: str) -> tuple[str, str]:
    name, equals, number = text.partition("=")
    if not (name and equals and number):
        raise SystemExit(f"--server-versions {text}: expected NAME=VERSION, such as torch=2.13.0.")
    return name, number


# The files.


def json_path(text: str) -> Path:
    """A parser's type for the path of results, refused before anything has run."""
    path = Path(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"expected a name that ends in .json, got {text}")
    return path


def write_results(
    path: Path,
    *,
    title: str,
    system: System,
    settings: Mapping[str, Any],
    figures: Sequence[Figure],
    notes: Sequence[str] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    details: Any = None,
) -> str:
    """Write the JSON file and the page beside it; folders are made.

    Args:
        path: of the JSON file; the page has its name with .md.
        title: of the page.
        system: what was evaluated.
        settings: how, such as numbers of samples and sampling parameters; values are JSON.
        figures: the results.
        notes: sentences for the page, such as the rule of the pass marks.
        tables: by their titles, further rows for both files; the rows of a table have the same keys.
        details: for the JSON file only.

    Returns:
        The page.

    Raises:
        ValueError: ``path`` does not end in .json.
    """
    if path.suffix != ".json":
        raise ValueError(f"expected a path that ends in .json, got {path.name}")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    tables = tables or {}
    content = {
        "title": title,
        "date": date,
        "system": asdict(system),
        "settings": dict(settings),
        "figures": [asdict(figure) | {"passed": figure.passed} for figure in figures],
        "passed": passed(figures) if any(figure.passed is not None for figure in figures) else None,
        "notes": list(notes),
        "tables": {name: [dict(row) for row in rows] for name, rows in tables.items()},
        "details": details,
    }
    page = _page(title, date, system, settings, figures, notes, tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    return page


def _page(
    title: str,
    date: str,
    system: System,
    settings: Mapping[str, Any],
    figures: Sequence[Figure],
    notes: Sequence[str],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    facts = {
        "model": system.model,
        "versions": ", ".join(f"{name} {number or 'not told'}" for name, number in system.versions.items()),
        "device": system.device or "not told",
        "flags": system.flags or "not told",
        "longest context": str(system.max_model_len or "not told"),
        "date": date,
    }
    facts |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    rows = [_figure_row(figure) for figure in figures]
    empty = {name for name in _figure_row(Figure("", 0.0)) if not any(row[name] for row in rows)}
    rows = [{name: cell for name, cell in row.items() if name not in empty} for row in rows]
    parts = [f"# {title}", _table(rows), *notes, _table([{"": name, " ": fact} for name, fact in facts.items()])]
    for name, table_rows in tables.items():
        parts += [f"## {name}", _table([{key: _number(value) for key, value in row.items()} for row in table_rows])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figure_row(figure: Figure) -> dict[str, str]:
    bound = "at least" if figure.higher_is_better else "at most"
    return {
        "figure": figure.name,
        "value": f"{_number(figure.value)} {figure.unit}".strip(),
        "standard error": _number(figure.stderr),
        "samples": _number(figure.samples),
        "published": _number(figure.published),
        "pass mark": "" if figure.pass_mark is None else f"{bound} {_number(figure.pass_mark)}",
        "passed": {None: "", True: "yes", False: "**no**"}[figure.passed],
    }


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value):
        # Shares to four digits after the point, as lm_eval prints them; larger numbers to two.
        if 0 < abs(value) < 0.001:
            return f"{value:.1e}"
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"
    return str(value)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in lines)
