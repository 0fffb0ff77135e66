from dataclasses import replace

import pytest
import torch

from kernels import naive
from kernels.inputs import PROBLEM, index_cache, loading
from vllm_dsv32.kernels import selection, warmup
from vllm_dsv32.kernels.dispatch import select_kernels
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.kernels.sparse_mla_join_triton import split_count
from vllm_dsv32.layout import index_key_views

ON_A_CPU = replace(PROBLEM, device_type="cpu", capability=None, topk=24)
KERNELS = select_kernels(ON_A_CPU)
LATENT_TABLE = torch.tensor([[5, 1]], dtype=torch.int32)
LATENT_BLOCK_SIZE = 32
NUM_KEYS = [5, 24, 25, 60, 0, 61, 62]


def select(kernels, generator, num_keys, max_num_keys):
    cache = index_cache(4, 16)
    views = index_key_views(cache)
    views.key_fp8.copy_(torch.randn(views.key_fp8.shape, generator=generator))
    views.key_scale.fill_(0.5)
    num_keys = torch.tensor(num_keys, dtype=torch.int32)
    topk_slot = torch.full((len(num_keys), ON_A_CPU.topk), -7, dtype=torch.int32)
    selection.select(
        kernels,
        torch.randn(len(num_keys), 4, 128, generator=generator).to(torch.float8_e4m3fn),
        torch.randn(len(num_keys), 4, generator=generator),
        cache,
        torch.tensor([[2, 0, 3, 1]], dtype=torch.int32),
        torch.zeros_like(num_keys),
        num_keys,
        num_keys.masked_fill(num_keys <= ON_A_CPU.topk, 0),
        max_num_keys,
        LATENT_TABLE,
        LATENT_BLOCK_SIZE,
        topk_slot,
    )
    return topk_slot


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_chunks_give_what_the_whole_gives(monkeypatch, rows_at_once):
    whole = select(KERNELS, torch.Generator().manual_seed(1), NUM_KEYS, 64)
    assert [(row >= 0).sum().item() for row in whole] == [min(24, n) for n in NUM_KEYS]
    monkeypatch.setattr(selection, "LOGITS_NBYTES", 4 * 64 * rows_at_once)
    scored = []

    def score(*arguments):
        logits = KERNELS.index_logits(*arguments)
        assert logits.nbytes <= selection.LOGITS_NBYTES
        scored.extend(arguments[-2].tolist())
        return logits

    chunked = replace(KERNELS, index_logits=score)
    assert torch.equal(select(chunked, torch.Generator().manual_seed(1), NUM_KEYS, 64), whole)
    assert scored == [n if n > 24 else 0 for n in NUM_KEYS]


def test_where_all_rows_are_short_nothing_is_scored(generator):
    """Nor is there memory for it, however many they are: none is set aside where contexts cannot be longer."""

    def score(*_):
        raise AssertionError

    def choose(logits, *rest):
        assert logits.untyped_storage().nbytes() <= 4 * 24
        KERNELS.topk_select(logits, *rest)

    slots = select(replace(KERNELS, index_logits=score, topk_select=choose), generator, [24, 3, 0], 24)
    assert slots.tolist() == [[*range(160, 160 + n), *[-1] * (24 - n)] for n in (24, 3, 0)]


def test_slots_are_of_the_latent_cache(generator):
    """Whose pages are others than those that the keys were read from, and of another size."""
    logits = []

    def score(q_fp8, weights, cache, block_table, *rest):
        assert block_table.tolist() == [[2, 0, 3, 1]]
        logits.append(KERNELS.index_logits(q_fp8, weights, cache, block_table, *rest))
        return logits[-1]

    slots = select(replace(KERNELS, index_logits=score), generator, NUM_KEYS, 64)
    positions = naive.topk(logits[0], torch.tensor(NUM_KEYS), 24)
    for row, seen in enumerate(NUM_KEYS):
        if seen <= 24:  # is not scored
            positions[row] = torch.tensor([*range(seen), *[-1] * (24 - seen)])
    wanted = naive.slots(positions, torch.zeros(len(NUM_KEYS)).int(), LATENT_TABLE, LATENT_BLOCK_SIZE)
    assert torch.equal(slots, wanted)


def test_warming_up_covers_decode_speculation_and_prefill(monkeypatch):
    """With the references; no GPU is needed to see which batches are run, and that the inputs fit the contracts."""
    described, prepared, scored, attended = [], [], [], []

    def describe(query_start_loc, seq_lens, topk, *per_token):
        KERNELS.token_keys(query_start_loc, seq_lens, topk, *per_token)
        described.append([int(x) for x in per_token])
        assert all(x.data_ptr() % 16 == 0 for x in per_token)

    def prepare(positions, table, layout, latents, index_keys, *queries):
        assert layout is RopeLayout.INTERLEAVED
        assert latents.cache.shape[1] == index_keys.cache.shape[1] == 32
        assert queries[1].w_uk_t.shape == (4, 96, 512)
        prepared.append(len(positions))
        return KERNELS.keys_and_queries(positions, table, layout, latents, index_keys, *queries)

    def score(q_fp8, weights, cache, block_table, request_ids, num_keys, width):
        assert cache.shape[1] == 32
        assert weights.dtype == torch.float32
        scored.append((len(block_table), len(q_fp8), width))
        return KERNELS.index_logits(q_fp8, weights, cache, block_table, request_ids, num_keys, width)

    def attend(q, cache, *rest):
        assert cache.shape[1] == 32
        attended.append(len(q))
        return KERNELS.sparse_mla(q, cache, *rest)

    monkeypatch.setattr(
        warmup,
        "select_kernels",
        lambda *_: replace(
            KERNELS, token_keys=describe, keys_and_queries=prepare, index_logits=score, sparse_mla=attend
        ),
    )
    for name in ("_describe", "_prepare", "_select", "_attend"):
        run = getattr(warmup, name)
        monkeypatch.setattr(warmup, name, lambda kernels, _, *shape, run=run: run(kernels, ON_A_CPU, *shape))
    with loading(torch.bfloat16):
        warmup.warm_up.__wrapped__(
            replace(ON_A_CPU, device_type="cuda"), (), 32, 100, 40, 6, 96, RopeLayout.INTERLEAVED
        )
    assert described == [[0, 1, 0, 1]]
    assert prepared == [1, 2, 4, 8, 16, 32, 40]
    shapes = [(1, 1), (1, 1), (2, 2), (1, 2), (4, 4), (1, 4), (1, 8), (1, 16), (1, 32), (1, 40)]
    assert scored == [
        (num_requests, num_tokens, width) for num_requests, num_tokens in shapes for width in (48, 96, 100)
    ]
    assert set(attended) == set(range(1, 41))


@pytest.mark.parametrize("num_multiprocessors", [58, 84, 108, 132, 142, 148, 188])
@pytest.mark.parametrize("num_concurrent", [1, 2, 3])
@pytest.mark.parametrize("tile_size", [32, 64, 128])
def test_beyond_what_is_warmed_up_keys_are_never_split(num_multiprocessors, num_concurrent, tile_size):
    most = num_multiprocessors * num_concurrent
    assert all(split_count(n, 2048, most, tile_size) == 1 for n in range(warmup._SPLIT_TOKENS, 4096))


def test_off_cuda_nothing_is_warmed_up(monkeypatch):
    monkeypatch.setattr(warmup, "select_kernels", None)
    warmup.warm_up.__wrapped__(ON_A_CPU, (), 64, 100, 40, 6, 128, RopeLayout.NEOX)
