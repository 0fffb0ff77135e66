"""A folder that `vllm serve` takes for a DeepSeek-V3.2 checkpoint, with written replies in place of weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, make_config
from vllm_dsv32.tools.tiny_tokenizer import write_tokenizer

# What the server needs besides, to run the folder with `replay_model.ReplayModel`.
MODULE_PATH = Path(__file__).parent
FLAGS = (
    *("--model-class-overrides", json.dumps({"DeepseekV32ForCausalLM": "replay_model:ReplayModel"})),
    *("--load-format", "dummy"),
    # A token takes four bytes: left alone, vLLM would make hundreds of thousands of pages.
    *("--num-gpu-blocks-override", "4096"),
)


def write_replay_checkpoint(folder: Path, replies: Mapping[str, Sequence[str]]) -> Path:
    """Write `folder`; `replies` are, for each user's message, what to say at first and after each tool round."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (folder / "replies.json").write_text(json.dumps(replies))
    # vLLM 0.32 on the CPU divides by uninitialised temperatures where it speculates and samples.
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0}))
    (folder / "config.json").write_text(json.dumps(make_config(TinyCheckpointOptions())))
    return folder


def seen_prompts(folder: Path) -> list[str]:
    """The prompts that the model was to answer so far."""
    path = folder / "prompts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
