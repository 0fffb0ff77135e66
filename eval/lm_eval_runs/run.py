"""One run of lm_eval against a server, and its results as files."""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from results_file import Figure, System, add_server_options, json_path, passed, served_system, write_results

from lm_eval_runs.settings import HELD_TO_ANOTHER, MARK_RULE, Settings, pass_mark
from lm_eval_runs.tasks import describe_file, load_task

__all__ = ["add_run_options", "check_free", "evaluate_and_report", "figures_of", "keywords"]

RESULTS = Path(__file__).parents[1] / "results"


def add_run_options(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """Add the options of the server and those that every run has."""
    add_server_options(parser)
    parser.add_argument(
        "--concurrency",
        type=_positive,
        default=defaults.num_concurrent,
        metavar="N",
        help="requests at once (default: %(default)s, as published)",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="take the first N problems only")
    published = "lm_eval's own" if defaults.timeout_s is None else f"{defaults.timeout_s}, as published"
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=defaults.timeout_s,
        metavar="SECONDS",
        help=f"for one reply (default: {published})",
    )
    parser.add_argument(
        "--out", type=json_path, metavar="FILE.json", help="results; FILE.md and FILE.samples.jsonl come beside it"
    )
    rerun = parser.add_mutually_exclusive_group()
    rerun.add_argument("--overwrite", action="store_true", help="results, and replies of a run that was cut short")
    rerun.add_argument(
        "--resume",
        action="store_true",
        help="a run that was cut short: with these settings, on this server",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


def keywords(settings: Settings, options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Of lm_eval's ``simple_evaluate``, all but the task."""
    model_args: dict[str, Any] = {
        "model": model,
        "base_url": f"{options.base_url.rstrip('/')}/{'chat/completions' if settings.is_chat else 'completions'}",
        "max_length": settings.max_length,
        "tokenized_requests": False,
        "tokenizer_backend": None,
        "num_concurrent": options.concurrency,
    }
    if options.timeout is not None:
        model_args["timeout"] = options.timeout
    return {
        "model": "local-chat-completions" if settings.is_chat else "local-completions",
        "model_args": model_args,
        "num_fewshot": settings.num_fewshot,
        "batch_size": 1,
        "apply_chat_template": settings.is_chat,
        "fewshot_as_multiturn": settings.is_chat,
        "gen_kwargs": dict(settings.generation),
        "limit": options.limit,
        "log_samples": True,
    }


def figures_of(settings: Settings, scores: Mapping[str, Any], num_problems: int) -> list[Figure]:
    """The scores of a task in lm_eval's results, held to the pass marks; one that is not there is missed.

    Args:
        settings: of the run.
        scores: "exact_match,FILTER" and "exact_match_stderr,FILTER", the latter not a number for one problem.
        num_problems: that were scored.
    """
    given = {name for metric, _, name in (key.partition(",") for key in scores) if metric == "exact_match"}
    figures = []
    for name in sorted(given | settings.held_to.keys()):
        stderr = scores.get(f"exact_match_stderr,{name}")
        figures.append(
            Figure(
                "exact_match" if name == "none" else f"exact_match, {name}",
                float(scores.get(f"exact_match,{name}", math.nan)),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                samples=num_problems,
                published=settings.published.get(name),
                pass_mark=pass_mark(settings.held_to[name], num_problems) if name in settings.held_to else None,
            )
        )
    return figures


def path_of(options: argparse.Namespace, stem: str) -> Path:
    """Of the results: --out, or by the stem, which a run on fewer problems does not share with one on all."""
    return options.out or RESULTS / f"{stem}{'' if options.limit is None else f'_limit_{options.limit}'}.json"


def _replies_of(path: Path) -> Path:
    """The database of replies that lm_eval keeps while a run goes on."""
    return path.with_suffix(".unfinished_rank0.db")


def check_free(options: argparse.Namespace, stem: str) -> None:
    """Look where the results are to go.

    Raises:
        SystemExit: there are some, or replies of a run that was cut short, and no option says what to do.
    """
    path = path_of(options, stem)
    if options.overwrite:
        return
    if path.exists():
        raise SystemExit(f"{path}: there are results already. Give another --out, or --overwrite.")
    if _replies_of(path).exists() and not options.resume:
        raise SystemExit(
            f"{_replies_of(path)} holds replies of a run that was cut short. "
            "--resume keeps them, --overwrite drops them."
        )


def evaluate_and_report(
    settings: Settings,
    options: argparse.Namespace,
    files: Mapping[str, Path],
    title: str,
    stem: str,
    system: System | None = None,
) -> None:
    """Run, write the results, print their page, and exit with 1 if a pass mark was missed.

    Args:
        settings: of the run.
        options: parsed, of :func:`add_run_options`.
        files: as :func:`load_task` takes them.
        title: of the results' page.
        stem: of the results' files where --out names none.
        system: what the server told, if it was asked already.
    """
    check_free(options, stem)
    system = system or served_system(options)
    path = path_of(options, stem)
    replies = _replies_of(path)
    if options.overwrite:
        replies.unlink(missing_ok=True)
    is_resumed = replies.exists()
    call = keywords(settings, options, system.model)
    with tempfile.TemporaryDirectory(prefix="lm-eval-") as folder:
        task = load_task(settings.task, files, Path(folder))
        results = lm_eval.simple_evaluate(
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),  # its own reads thousands of files
            use_cache=str(replies).removesuffix("_rank0.db"),  # lm_eval adds the rest of the name
            **call,
        )
    samples = results["samples"][settings.task]
    num_problems = len({sample["doc_id"] for sample in samples})
    said = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    figures = figures_of(settings, results["results"][settings.task], num_problems)
    notes = [MARK_RULE] if settings.held_to else ["No pass mark: these are not the settings of a published run."]
    if settings.held_to and not settings.published:
        notes.append(HELD_TO_ANOTHER)
    config = results["configs"][settings.task]
    page = write_results(
        path,
        title=title,
        system=system,
        settings={
            "lm_eval": version("lm_eval"),
            "task": f"{settings.task}, version {results['versions'][settings.task]}",
            "API": call["model"],
            "examples": results["n-shot"][settings.task],
            "generation": config["generation_kwargs"],
            "requests at once": options.concurrency,
            "data": {split: describe_file(file) for split, file in files.items()} or config["dataset_path"],
            "problems": num_problems,
            "limit": options.limit,
            "timeout": options.timeout,
            "resumed": is_resumed,
            "empty replies": sum(not reply.strip() for reply in said.values()),
        },
        figures=figures,
        notes=notes,
    )
    _write_samples(path.with_suffix(".samples.jsonl"), samples)
    replies.unlink()
    print(page)
    raise SystemExit(not passed(figures))


def _write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    """A line for each problem and filter: what was asked for, what was said, what was made of it."""
    keys = {"doc_id": "problem", "filter": "filter", "target": "target", "exact_match": "right"}
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            row = {name: sample[key] for key, name in keys.items()}
            row |= {"extracted": sample["filtered_resps"][0], "reply": sample["resps"][0][0]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
