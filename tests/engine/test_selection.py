"""What the layers select inside the engine, against a naive selection on the same quantised values."""

import torch

from engine.checkpoints import TOPK, checkpoint, prompts
from engine.harness import complete, engine, kernels_replaced
from kernels import naive


class Recorder:
    """Keeps the inputs of the indexer and the positions that came out, for single-request steps."""

    def __init__(self):
        self.steps = []

    def index_logits(self, original):
        def recorded(q_fp8, weights, cache, block_table, request_ids, num_keys, width):
            self.steps.append(
                (q_fp8.clone(), weights.clone(), cache.clone(), block_table.clone(), num_keys.clone())
            )
            return original(q_fp8, weights, cache, block_table, request_ids, num_keys, width)

        return recorded

    def topk_slots(self, original):
        def recorded(topk_pos, *rest):
            self.steps[-1] += (topk_pos.clone(),)
            return original(topk_pos, *rest)

        return recorded


def test_selected_sets_are_the_naive_ones():
    path = checkpoint("experts, YaRN")
    recorder = Recorder()
    with engine(path) as llm:
        replaced = {"index_logits": recorder.index_logits, "topk_slots": recorder.topk_slots}
        with kernels_replaced(llm, **replaced):
            complete(llm, prompts(2 * TOPK), 3, prompt_logits=False)
    compared = 0
    for q_fp8, weights, cache, block_table, num_keys, topk_pos in recorder.steps:
        request = torch.zeros(1, dtype=torch.int32)
        for row in sorted({0, TOPK - 1, TOPK, len(q_fp8) - 1} & set(range(len(q_fp8)))):
            at = slice(row, row + 1)
            logits = naive.index_logits(
                q_fp8[at].float(), weights[at], cache, block_table, request, num_keys[at], int(num_keys[row])
            )[0]
            selected = topk_pos[row][topk_pos[row] >= 0].tolist()
            assert len(selected) == len(set(selected)) == min(TOPK, int(num_keys[row]))
            left_out = sorted(set(range(int(num_keys[row]))) - set(selected))
            compared += 1
            if left_out:
                # Ties aside, and what float32 cannot tell from a tie.
                margin = 1e-5 * logits.abs().max()
                assert logits[selected].min() >= logits[left_out].max() - margin
    assert compared >= 15
