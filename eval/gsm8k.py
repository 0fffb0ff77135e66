"""GSM8K through lm_eval with the settings of the published run; exits with 1 below the pass mark.

    python eval/gsm8k.py --base-url http://127.0.0.1:8000/v1                 5 examples, published: 0.956
    python eval/gsm8k.py --base-url http://127.0.0.1:8000/v1 --examples 20

With 5 examples a prompt is shorter than the 2,048 tokens that sparse attention selects, and says nothing of the
indexer; with 20 it is longer. Writes eval/results/gsm8k_5_shot.json (or 20; with --limit N, gsm8k_5_shot_limit_N),
a page (.md) and the replies (.samples.jsonl). What was answered before a run was cut short, --resume keeps.

Without access to the Hugging Face hub: --data test.jsonl --examples-data train.jsonl, the two files of the data
set's own repository (github.com/openai/grade-school-math, grade_school_math/data).
"""

import argparse
from pathlib import Path

from lm_eval_runs.run import add_run_options, evaluate_and_report
from lm_eval_runs.settings import GSM8K, gsm8k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, GSM8K)
    parser.add_argument("--examples", type=int, default=5, metavar="N", help="before each problem (default: 5)")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask through /chat/completions, examples as a conversation: for a server without /completions. "
        "Not the published way, so without a pass mark",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="problems: JSON lines, question and answer")
    parser.add_argument(
        "--examples-data", type=Path, metavar="FILE", help="examples are drawn from it; same format"
    )
    options = parser.parse_args()
    if (options.data is None) != (options.examples_data is None):
        parser.error("--data and --examples-data come together: examples are drawn from the training problems")
    files = {"train": options.examples_data, "test": options.data} if options.data else {}
    settings = gsm8k(options.examples, is_chat=options.chat)
    stem = f"gsm8k_{options.examples}_shot{'_chat' if options.chat else ''}"
    evaluate_and_report(settings, options, files, f"GSM8K, {options.examples} examples", stem)


if __name__ == "__main__":
    main()
