"""Drafting with the MTP layer changes how fast tokens come, not which."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import TOPK, prompts
from engine.harness import complete, engine
from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, WeightScales, write_checkpoint


@pytest.fixture(scope="module")
def drafting_checkpoint(tmp_path_factory) -> Path:
    """A model whose next token is mostly a fixed function of the last, which its draft layer knows.

    With plain random weights no draft is ever accepted, and the path that accepts would stay untested.
    """
    path = tmp_path_factory.mktemp("checkpoints") / "drafting"
    scales = WeightScales(o_proj=1.5, mlp=1.5)
    write_checkpoint(path, TinyCheckpointOptions(dtype="float32", index_topk=TOPK, weight_scales=scales))
    weights = load_file(path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    head = embedding[torch.randperm(len(embedding), generator=torch.Generator().manual_seed(1))]
    hidden = embedding.shape[1]
    eh_proj = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), dim=1)
    weights["lm_head.weight"] = head
    weights["model.layers.3.shared_head.head.weight"] = head.clone()
    weights["model.layers.3.eh_proj.weight"] = eh_proj
    save_file(weights, path / "model.safetensors")
    return path


def test_greedy_output_with_drafts_is_the_plain_one(drafting_checkpoint):
    asked = prompts(TOPK - 2, 3 * TOPK, 9)
    with engine(drafting_checkpoint) as llm:
        plain = [c.generated for c in complete(llm, asked, 24, prompt_logits=False)]
    for num_drafts in (1, 2):
        options = {"method": "mtp", "num_speculative_tokens": num_drafts}
        with engine(drafting_checkpoint, speculative_config=options, disable_log_stats=False) as llm:
            drafted = [c.generated for c in complete(llm, asked, 24, prompt_logits=False)]
            counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        proposed = counts["vllm:spec_decode_num_draft_tokens"]
        accepted = counts["vllm:spec_decode_num_accepted_tokens"]
        print(f"{num_drafts} drafts a step: {accepted} of {proposed} accepted")
        assert drafted == plain
        assert 0 < accepted < proposed


def test_two_draft_layers(tmp_path):
    options = TinyCheckpointOptions(dtype="float32", index_topk=TOPK, dense_only=True, num_nextn_predict_layers=2)
    path = write_checkpoint(tmp_path / "two", options)
    asked = prompts(9, 3 * TOPK)
    with engine(path) as llm:
        plain = [c.generated for c in complete(llm, asked, 8, prompt_logits=False)]
    with engine(path, speculative_config={"method": "mtp", "num_speculative_tokens": 2}) as llm:
        drafted = [c.generated for c in complete(llm, asked, 8, prompt_logits=False)]
    assert drafted == plain
