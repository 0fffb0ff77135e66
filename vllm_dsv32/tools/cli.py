"""The ``vllm-dsv32`` command."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_dsv32.errors import Dsv32Error

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0 for success, 1 for a negative verdict of ``doctor``, 2 for arguments or files that
        the command cannot work with.
    """
    arguments = vars(_parser().parse_args(argv))
    commands: dict[str, Callable[..., int]] = {"doctor": _doctor, "make-checkpoint": _make_checkpoint}
    command = arguments.pop("command")
    try:
        return commands[command](**arguments)
    except (Dsv32Error, OSError) as error:
        print(f"vllm-dsv32: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-dsv32", description="DeepSeek-V3.2 for stock vLLM: tools.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="say whether `vllm serve` would use this plugin here, and with which kernels",
        description="Load vLLM's plugins as `vllm serve` does, and report who owns what. "
        "The exit status is 1 if DeepSeek-V3.2 would not be served by this plugin.",
    )
    doctor.add_argument("--json", action="store_true", dest="as_json", help="print the report as JSON")

    make = commands.add_parser(
        "make-checkpoint",
        help="write a small random-weight DeepSeek-V3.2 checkpoint",
        description="Write a random-weight checkpoint of a few MB in the published format, with tokenizer.",
        # An option left out falls to the default of TinyCheckpointOptions, whose module is slow to import.
        argument_default=argparse.SUPPRESS,
    )
    make.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    make.add_argument("--overwrite", action="store_true", default=False, help="replace a checkpoint at OUT")
    make.add_argument("--seed", type=int, help="of the weights; default 0")
    for flag, key, meaning in _SIZE_FLAGS:
        make.add_argument(flag, type=int, dest=key, metavar="N", help=f"{meaning} ({key})")
    make.add_argument("--dtype", choices=("bfloat16", "float32"), help="of unquantised weights; default bfloat16")
    make.add_argument(
        "--weight-format",
        choices=("plain", "fp8", "fp8_dequantized"),
        help="fp8: the published 128x128 blocks; fp8_dequantized: the same numbers in --dtype; default plain",
    )
    make.add_argument("--no-yarn", action="store_false", dest="yarn", help="leave RoPE unscaled")
    make.add_argument("--dense-only", action="store_true", help="no experts in any layer")
    make.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        type=_parse_override,
        metavar="KEY=JSON",
        help="set any key of config.json, null to remove it; shapes follow; may be repeated",
    )
    return parser


_SIZE_FLAGS = (
    ("--layers", "num_hidden_layers", "decoder layers"),
    ("--dense-layers", "first_k_dense_replace", "leading layers without experts"),
    ("--mtp-layers", "num_nextn_predict_layers", "multi-token-prediction layers"),
    ("--hidden-size", "hidden_size", "width of the residual stream"),
    ("--heads", "num_attention_heads", "attention heads"),
    ("--index-heads", "index_n_heads", "heads of the indexer"),
    ("--top-k", "index_topk", "tokens that a query attends to"),
    ("--experts", "n_routed_experts", "routed experts"),
    ("--experts-per-token", "num_experts_per_tok", "experts that a token is sent to"),
    ("--expert-groups", "n_group", "groups of experts"),
    ("--top-groups", "topk_group", "groups that a token may choose experts from"),
)


def _doctor(*, as_json: bool) -> int:
    # vLLM warns of every name that a plugin takes over; that is what the report is about.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    from vllm_dsv32.tools import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=2) if as_json else doctor.render(report))
    return 0 if report["served_by_plugin"] else 1


def _make_checkpoint(*, out: Path, overwrite: bool, overrides: list[tuple[str, Any]], **options: Any) -> int:
    from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, write_checkpoint

    checkpoint = TinyCheckpointOptions(config_overrides=dict(overrides), **options)
    write_checkpoint(out, checkpoint, overwrite=overwrite)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: random-weight DeepSeek-V3.2 checkpoint, {size / 1e6:.1f} MB")
    return 0


def _parse_override(item: str) -> tuple[str, Any]:
    key, separator, text = item.partition("=")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        key = ""
    if not (key and separator):
        raise argparse.ArgumentTypeError(f"expected KEY=JSON such as index_topk=32, got {item!r}")
    return key, value
