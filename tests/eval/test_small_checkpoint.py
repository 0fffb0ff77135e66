"""The trained small model through the plugin: what it can do, and that faults of the kernels take it away."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from vllm import SamplingParams

from engine.faults import (
    index_rope_interleaved,
    index_rotates_only_q,
    index_scale_in_nominal_row,
    random_selection,
    stale_topk_buffer,
)
from engine.harness import engine, kernels_replaced
from server.process import serve
from small_model.repliers import served, transformed
from small_model.score import PASS_MARKS, SIZES, held_out_chats, is_right, score
from vllm_dsv32.serving.encoding import encode_messages

CHECKPOINT = Path(__file__).parents[2] / "eval" / "small_model" / "checkpoint"
FAULTS = (
    index_rope_interleaved,
    random_selection,
    index_rotates_only_q,
    stale_topk_buffer,
    index_scale_in_nominal_row,
)


def test_checkpoint_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 24 << 20


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> dict[str, list[bool]]:
    """The command's, at the size for every day."""
    model = tmp_path_factory.mktemp("small") / "model"
    model.symlink_to(CHECKPOINT)
    with serve(model, "--dtype", "float32", "--max-model-len", "17408") as server:
        return dict(score(served(f"{server.url}/v1"), "small"))


@pytest.mark.timeout(900)
def test_served_scores_pass(scores):
    shares = {kind: sum(rights) / len(rights) for kind, rights in scores.items()}
    print(shares)
    assert {kind for kind, share in shares.items() if share < PASS_MARKS[kind]} == set()


@pytest.mark.timeout(900)
def test_served_scores_equal_those_of_transformers(scores):
    reply = transformed(CHECKPOINT)
    for kind in ("tool loop", "arithmetic", "needle 1K", "needle 4K"):  # at 16K it takes a minute a chat
        expected = [is_right(chat, reply) for chat in held_out_chats(kind, SIZES["small"][kind])]
        assert abs(sum(scores[kind]) - sum(expected)) <= 0.01 * len(expected), kind


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cache", ["auto", "fp8_ds_mla"])
def test_each_fault_of_the_selection_halves_the_needle_score(cache):
    chats = held_out_chats("needle 1K", 4)
    with engine(
        CHECKPOINT,
        max_model_len=2048,
        max_num_batched_tokens=8192,
        kv_cache_dtype=cache,
    ) as llm:
        assert num_found(llm, chats) == len(chats)
        faults = FAULTS if cache == "auto" else (index_scale_in_nominal_row,)
        found = {}
        for fault in faults:
            with kernels_replaced(llm, **fault()):
                found[fault.__name__] = num_found(llm, chats)
    print(cache, found)
    assert max(found.values()) < len(chats) / 2, found


def num_found(llm, chats) -> int:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    params = SamplingParams(max_tokens=100, temperature=0, detokenize=False, stop_token_ids=[1])
    for index, chat in enumerate(chats):
        prompt = encode_messages(chat.messages[:1], add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        llm.add_request(str(index), {"prompt_token_ids": ids}, params)
    texts = {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.finished:
                texts[int(output.request_id)] = tokenizer.decode(list(output.outputs[0].token_ids))
    return sum(chat.answer in texts[index] for index, chat in enumerate(chats))
