"""What the layers select inside the engine, against a naive selection on the same quantised values."""

from dataclasses import replace

import torch

from engine.checkpoints import TOPK, checkpoint, prompts
from engine.harness import complete, engine, kernels_replaced
from kernels import naive
from vllm_dsv32.attention.caches import IndexKeyCache


class Recorder:
    """Keeps the inputs of the indexer and the positions whose slots came out, for single-request steps."""

    def __init__(self):
        self.scored, self.selected = [], []

    def index_logits(self, original):
        def recorded(q_fp8, weights, cache, block_table, request_ids, num_scored, width):
            self.scored.append(tuple(x.cpu().clone() for x in (q_fp8, weights, cache, block_table, num_scored)))
            return original(q_fp8, weights, cache, block_table, request_ids, num_scored, width)

        return recorded

    def topk_select(self, original):
        def recorded(logits, num_keys, request_ids, block_table, block_size, topk_slot):
            original(logits, num_keys, request_ids, block_table, block_size, topk_slot)
            topk_pos = positions(topk_slot.cpu(), block_table[0].tolist(), block_size)
            self.selected.append((num_keys.cpu().clone(), topk_pos))

        return recorded


def positions(slots: torch.Tensor, pages: list[int], block_size: int) -> torch.Tensor:
    """Where in a request its slots are; a slot of no page of its own is an error."""
    rows = [
        [-1 if slot < 0 else pages.index(slot // block_size) * block_size + slot % block_size for slot in row]
        for row in slots.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(slots.shape)


def record(prompt_length: int) -> Recorder:
    recorder = Recorder()
    with engine(checkpoint("experts, YaRN"), enforce_eager=True) as llm:
        replaced = {"index_logits": recorder.index_logits, "topk_select": recorder.topk_select}
        with kernels_replaced(llm, **replaced):
            complete(llm, prompts(prompt_length), 3, prompt_logits=False)
    return recorder


def test_selected_sets_are_the_naive_ones():
    recorder = record(2 * TOPK)
    compared = 0
    for scoring, (num_keys, topk_pos) in zip(recorder.scored, recorder.selected, strict=True):
        q_fp8, weights, cache, block_table, num_scored = scoring
        request = torch.zeros(1, dtype=torch.int32)
        assert torch.equal(num_scored, num_keys.masked_fill(num_keys <= TOPK, 0))
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


def test_nothing_is_scored_while_the_top_k_takes_all():
    recorder = record(TOPK - 3)
    assert recorder.scored == []
    assert recorder.selected
    for num_keys, topk_pos in recorder.selected:
        for row, count in zip(topk_pos.tolist(), num_keys.tolist(), strict=True):
            assert row == [*range(count), *[-1] * (TOPK - count)]


def test_keys_are_read_by_the_table_of_their_cache_and_slots_are_of_the_other(monkeypatch):
    """vLLM gives both caches one table here; a copy of it stands for the index keys' own."""
    of_index_keys, scored, selected = [], [], []
    original = IndexKeyCache.metadata

    def metadata(self):
        found = original(self)
        if found is None:
            return None
        of_index_keys.append(found.block_table.clone())
        return replace(found, block_table=of_index_keys[-1])

    def is_of_index_keys(table):
        return any(table is copy for copy in of_index_keys)

    def index_logits(original):
        return lambda *args: scored.append(is_of_index_keys(args[3])) or original(*args)

    def topk_select(original):
        return lambda *args: selected.append(is_of_index_keys(args[3])) or original(*args)

    monkeypatch.setattr(IndexKeyCache, "metadata", metadata)
    with (
        engine(checkpoint("experts, YaRN"), enforce_eager=True) as llm,
        kernels_replaced(llm, index_logits=index_logits, topk_select=topk_select),
    ):
        complete(llm, prompts(2 * TOPK), 2, prompt_logits=False)
    assert set(scored) == {True}
    assert set(selected) == {False}
