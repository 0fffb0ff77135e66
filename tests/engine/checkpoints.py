"""The small checkpoints that the engine tests run, written once a test session."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, write_checkpoint

TOPK = 64

SHAPES = {
    "experts, YaRN": TinyCheckpointOptions(dtype="float32", index_topk=TOPK),
    "dense, no YaRN": TinyCheckpointOptions(dtype="float32", index_topk=TOPK, dense_only=True, yarn=False, seed=1),
    "other widths": TinyCheckpointOptions(
        dtype="float32",
        index_topk=TOPK,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        hidden_size=320,
        num_attention_heads=6,
        q_lora_rank=192,
        qk_nope_head_dim=96,
        v_head_dim=64,
        # Not fewer: then all ReLUs of many keys are zero, exact ties that the oracle breaks in another way.
        index_n_heads=12,
        seed=2,
    ),
    # As transformers writes a configuration, and without what other models of the family add.
    "options left out": TinyCheckpointOptions(
        dtype="float32",
        index_topk=TOPK,
        num_nextn_predict_layers=0,
        seed=3,
        config_overrides={
            "scoring_func": None,
            "topk_method": None,
            "moe_layer_freq": None,
            "ep_size": None,
        },
    ),
}

# For comparisons in the dtype that the model is deployed in; flipped experts would blur them.
BFLOAT16 = TinyCheckpointOptions(index_topk=TOPK, dense_only=True, seed=4)


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dsv32-checkpoints-")


@functools.cache
def _write(key: str) -> Path:
    path = Path(_root().name) / key.replace(" ", "-").replace(",", "")
    options = BFLOAT16 if key == "bfloat16" else SHAPES[key]
    # On a GPU vLLM multiplies float32 experts in TF32, whose errors would hide ours.
    write_checkpoint(path, replace(options, dense_only=True) if torch.cuda.is_available() else options)
    return path


def checkpoint(shape: str) -> Path:
    """The folder of one of :data:`SHAPES`, or of "bfloat16"."""
    return _write(shape)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 250, (length,), generator=generator).tolist() for length in lengths]
