"""DeepSeek-V3.2 with the published widths and fewer layers, heads and experts, in the published fp8 format."""

import json
from pathlib import Path

from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, make_config, write_checkpoint

__all__ = ["REDUCED", "given_or_reduced", "write_random_checkpoint", "write_reduced_config"]

REDUCED = "reduced, four layers"
"""Its name in results."""

_WIDTHS = {
    "hidden_size": 7168,
    "num_attention_heads": 16,
    "q_lora_rank": 1536,
    "index_n_heads": 64,
    "index_topk": 2048,
    "moe_intermediate_size": 2048,
}


def given_or_reduced(model: Path | None, folder: Path) -> Path:
    """The model to time, given or reduced; the latter's configuration goes into ``folder``."""
    if model is not None:
        return model
    write_reduced_config(folder / "model")
    return folder / "model"


def write_reduced_config(folder: Path) -> None:
    """Four layers with a sixteenth of the experts, a rank's share of the heads at TP 8; for --load-format dummy."""
    options = TinyCheckpointOptions(
        **_WIDTHS,
        weight_format="fp8",
        intermediate_size=18432,
        num_hidden_layers=4,
        n_routed_experts=32,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        config_overrides={"vocab_size": 129280},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(make_config(options), indent=1))


def write_random_checkpoint(folder: Path) -> None:
    """About 1.5 GB of weights that say something: each layer's share of the result is that of the others.

    No experts: which of them a token takes flips with rounding, and that would hide other differences.
    """
    write_checkpoint(
        folder,
        TinyCheckpointOptions(
            **_WIDTHS, weight_format="fp8", intermediate_size=4096, num_hidden_layers=3, dense_only=True
        ),
    )
