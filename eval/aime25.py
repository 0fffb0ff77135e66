"""AIME 2025 through lm_eval with the settings of the published run; exits with 1 below the pass mark.

    python eval/aime25.py --base-url http://127.0.0.1:8000/v1                published: 0.933, 28 of 30

Thinking is on, temperature 1.0, top_p 0.95, and a reply may take 72,768 tokens, so the server needs a
--max-model-len above that, and a reasoning parser: the reasoning is not scored. Writes eval/results/aime25.json
(with --limit N, aime25_limit_N), a page (.md) and the replies (.samples.jsonl). What was answered before a run was
cut short, --resume keeps.

Without access to the Hugging Face hub: --data test.jsonl, the file of its data set math-ai/aime25.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from lm_eval_runs.run import add_run_options, check_free, evaluate_and_report
from lm_eval_runs.settings import AIME25
from lm_eval_runs.thinking import check_reasoning_is_apart, check_room
from results_file import served_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, AIME25)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=AIME25.generation["max_gen_toks"],
        metavar="N",
        help="of a reply with its reasoning (default: %(default)s, as published; with less, the mark is the same)",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="problems: JSON lines, problem and answer")
    options = parser.parse_args()
    check_free(options, "aime25")
    system = served_system(options)
    check_room(system.max_model_len, options.max_tokens)
    check_reasoning_is_apart(options.base_url, system.model)
    settings = replace(AIME25, generation={**AIME25.generation, "max_gen_toks": options.max_tokens})
    files = {"test": options.data} if options.data else {}
    evaluate_and_report(settings, options, files, "AIME 2025", "aime25", system)


if __name__ == "__main__":
    main()
