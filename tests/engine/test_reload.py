"""Weights that vLLM replaces in a running engine, as between the steps of reinforcement learning."""

from dataclasses import replace

from engine.checkpoints import SHAPES, TOPK, checkpoint, prompts
from engine.comparison import assert_close
from engine.harness import complete, engine
from engine.oracle import load_oracle
from vllm_dsv32.tools.tiny_checkpoint import write_checkpoint


def test_new_weights_reach_everything_that_is_made_of_weights(tmp_path):
    # Without experts: on a CPU vLLM 0.32 does not pack new ones for its kernel.
    shape = "dense, no YaRN"
    other = tmp_path / "other"
    write_checkpoint(other, replace(SHAPES[shape], seed=7))
    with engine(checkpoint(shape)) as llm:
        complete(llm, prompts(8), 1)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        completions = complete(llm, prompts(TOPK - 1, 4 * TOPK), 8)
    assert_close(load_oracle(other, fp8_latent=False), completions, "auto")
