"""`vllm bench serve` with the load of vLLM's V3.2 recipe, and the figures published there beside ours.

    python eval/bench_serve.py --base-url http://127.0.0.1:8000/v1 --out bench.json      (and bench.md)
    python eval/bench_serve.py --base-url URL --out bench.json --serve 'vllm serve DIR --port 8000 ...'
    python eval/bench_serve.py --base-url URL --out bench.json --serve '...' --compare-in-tree

With --serve the server is started, measured and stopped; with --compare-in-tree the same command is then run once
more without plugins. The published figures are of 8 x H20 at TP 8, so they are shown for the published load only.
Exits with 1 if a request failed, or a pass mark was missed.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine_runs.sides import IN_TREE, PLUGIN
from results_file import Figure, System, add_server_options, json_path, passed, served_system, write_results
from serving_runs.server import ServerError, running

__all__ = ["LINES", "PUBLISHED_LOAD", "Line", "Load", "bench_command", "figures_of", "table_of"]

RATIO_PASS_MARK = 0.95
"""Output tokens a second of the plugin over those of vLLM's own; runs differ by a few percent."""


@dataclass(frozen=True)
class Load:
    """Random prompts, sent at random times."""

    input_tokens: int = 2048
    output_tokens: int = 1024
    request_rate: float = 10.0
    prompts: int = 100


PUBLISHED_LOAD = Load()


@dataclass(frozen=True)
class Line:
    """One line of the benchmark's report."""

    name: str
    key: str
    """In the JSON that the benchmark writes."""
    published: float
    unit: str = ""
    higher_is_better: bool = False


LINES = (
    Line("successful requests", "completed", 100, higher_is_better=True),
    Line("failed requests", "failed", 0),
    Line("benchmark duration", "duration", 129.34, "s"),
    Line("total input tokens", "total_input_tokens", 204_800, higher_is_better=True),
    Line("total generated tokens", "total_output_tokens", 102_400, higher_is_better=True),
    Line("request throughput", "request_throughput", 0.77, "requests/s", higher_is_better=True),
    Line("output token throughput", "output_throughput", 791.73, "tokens/s", higher_is_better=True),
    Line("peak output token throughput", "max_output_tokens_per_s", 1300.0, "tokens/s", higher_is_better=True),
    Line("peak concurrent requests", "max_concurrent_requests", 100),
    Line("total token throughput", "total_token_throughput", 2375.18, "tokens/s", higher_is_better=True),
    Line("mean time to first token", "mean_ttft_ms", 21_147.20, "ms"),
    Line("median time to first token", "median_ttft_ms", 21_197.97, "ms"),
    Line("P99 time to first token", "p99_ttft_ms", 41_133.00, "ms"),
    Line("mean time per output token", "mean_tpot_ms", 99.71, "ms"),
    Line("median time per output token", "median_tpot_ms", 99.25, "ms"),
    Line("P99 time per output token", "p99_tpot_ms", 124.28, "ms"),
    Line("mean inter-token latency", "mean_itl_ms", 99.71, "ms"),
    Line("median inter-token latency", "median_itl_ms", 76.89, "ms"),
    Line("P99 inter-token latency", "p99_itl_ms", 2032.37, "ms"),
)
"""The published report, 8 x H20 at TP 8."""

_THROUGHPUT = "output_throughput"


def bench_command(base_url: str, model: str, load: Load, result: Path, flags: Sequence[str] = ()) -> list[str]:
    """The published command; its abbreviated flags are written out.

    The temperature is 0, which the benchmark once set by itself; now it leaves it to the server.
    """
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--base-url", base_url.rstrip("/").removesuffix("/v1"), "--model", model, "--dataset-name", "random"),
        *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
        *("--request-rate", str(load.request_rate), "--num-prompts", str(load.prompts), "--trust-remote-code"),
        *("--temperature", "0"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name),
        *flags,
    ]


def bench(base_url: str, model: str, load: Load, flags: Sequence[str]) -> dict[str, Any]:
    """Run it, its progress and report on the terminal; return what it measured.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = bench_command(base_url, model, load, result, flags)
        if status := subprocess.run(command).returncode:
            raise SystemExit(f"vllm bench serve ended with status {status}; the command was: {shlex.join(command)}")
        return json.loads(result.read_text())


def figures_of(result: Mapping[str, Any], load: Load, throughput_mark: float | None) -> list[Figure]:
    """Every line of the report; all requests must have succeeded.

    Args:
        result: the JSON that the benchmark wrote.
        load: that was asked for.
        throughput_mark: tokens a second to be reached.
    """
    marks = {"completed": load.prompts, "failed": 0, _THROUGHPUT: throughput_mark}
    return [
        Figure(
            line.name,
            result[line.key],
            unit=line.unit,
            published=line.published if load == PUBLISHED_LOAD else None,
            pass_mark=marks.get(line.key),
            higher_is_better=line.higher_is_better,
        )
        for line in LINES
    ]


def ratio_figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    ratio = results[PLUGIN][_THROUGHPUT] / results[IN_TREE][_THROUGHPUT]
    return Figure("output token throughput, plugin / in-tree", ratio, pass_mark=RATIO_PASS_MARK)


def table_of(results: Mapping[str, Mapping[str, Any]], load: Load) -> list[dict[str, Any]]:
    """The report of each side, beside the published one where the load is the same."""
    rows = []
    for line in LINES:
        row: dict[str, Any] = {"figure": line.name, "unit": line.unit}
        if load == PUBLISHED_LOAD:
            row["published (8 x H20)"] = line.published
        rows.append(row | {side: result[line.key] for side, result in results.items()})
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(rows[0])[2:]
    print(f"{'':42}" + "".join(f"{name:>20}" for name in columns))
    for row in rows:
        title = f"{row['figure']} ({row['unit']})" if row["unit"] else row["figure"]
        print(f"{title:42}" + "".join(f"{row[name]:20,.2f}" for name in columns), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    load = Load(options.input_tokens, options.output_tokens, options.request_rate, options.prompts)
    mark = options.pass_mark
    if mark is None and load == PUBLISHED_LOAD:
        mark = next(line.published for line in LINES if line.key == _THROUGHPUT)
    results: dict[str, dict[str, Any]] = {}
    figures: list[Figure] = []
    for side in (PLUGIN, IN_TREE) if options.compare_in_tree else (PLUGIN,):
        try:
            with server(options, side):
                system = served_system(options)
                system = replace(system, flags=system.flags or options.serve)
                results[side] = bench(options.base_url, system.model, load, shlex.split(options.bench_flags))
        except ServerError as error:
            raise SystemExit(f"bench_serve: {error}") from None
        if side == PLUGIN:
            figures = figures_of(results[side], load, mark)
        else:
            figures.append(ratio_figure(results))
        # After each side: if the second one fails, the first is kept.
        write(options, system, load, results, figures)
        print_table(table_of(results, load))
    for figure in figures:
        if figure.passed is False:
            print(f"{figure.name}: {figure.value:,.2f} misses the pass mark of {figure.pass_mark:,.2f}")
    return int(not passed(figures))


def server(options: argparse.Namespace, side: str) -> Any:
    """The one that is to be started, or nothing."""
    if options.serve is None:
        return nullcontext()
    log = options.out.with_suffix(f".{side}.log")
    print(f"{side}: {options.serve}; log in {log}", flush=True)
    return running(options.serve, side, options.base_url, log, start_timeout=options.start_timeout)


def write(
    options: argparse.Namespace,
    system: System,
    load: Load,
    results: Mapping[str, Mapping[str, Any]],
    figures: Sequence[Figure],
) -> None:
    """The files, if they are wanted."""
    if options.out is None:
        return
    notes = ["All requests must succeed."]
    if load == PUBLISHED_LOAD:
        notes.append("Published are vLLM's figures for 8 x H20 at TP 8; the pass mark is their output throughput.")
    if len(results) > 1:
        notes.append(f"Against vLLM's own implementation the pass mark, a goal, is a ratio of {RATIO_PASS_MARK}.")
    elif options.compare_in_tree:
        notes.append("vLLM's own implementation has not been measured yet, or did not start.")
    command = bench_command("URL/v1", system.model, load, Path("DIR/FILE"), shlex.split(options.bench_flags))
    write_results(
        options.out,
        title="vllm bench serve",
        system=system,
        settings={"command": shlex.join(["vllm", *command[3:]])},
        figures=figures,
        notes=notes,
        tables={"Both sides": table_of(results, load)} if len(results) > 1 else None,
        details=dict(results),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_options(parser)
    parser.add_argument("--out", type=json_path, metavar="FILE.json", help="write the results here, and to FILE.md")
    parser.add_argument("--serve", metavar="COMMAND", help="start this server on --base-url, and stop it")
    parser.add_argument("--compare-in-tree", action="store_true", help="measure it without plugins, too")
    parser.add_argument("--start-timeout", type=float, default=7200, help="seconds (default: 7200)")
    parser.add_argument("--bench-flags", default="", help="further ones of the benchmark: '--tokenizer DIR'")
    load = parser.add_argument_group("the load", "By default the published one.")
    load.add_argument("--input-tokens", type=int, default=PUBLISHED_LOAD.input_tokens)
    load.add_argument("--output-tokens", type=int, default=PUBLISHED_LOAD.output_tokens)
    load.add_argument("--request-rate", type=float, default=PUBLISHED_LOAD.request_rate, help="a second")
    load.add_argument("--prompts", type=int, default=PUBLISHED_LOAD.prompts)
    load.add_argument(
        "--pass-mark", type=float, help="output tokens a second (default: the published, for the published load)"
    )
    options = parser.parse_args(arguments)
    if options.compare_in_tree and options.serve is None:
        parser.error("--compare-in-tree needs --serve COMMAND: both sides are started in turn")
    if options.serve is not None and options.out is None:
        parser.error("--serve needs --out FILE.json: the server's log goes beside it")
    return options


if __name__ == "__main__":
    sys.exit(main())
