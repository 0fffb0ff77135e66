"""What is particular to the Gluon kernel, which no interpreter runs: real tiles, rings that turn, what it takes."""

from dataclasses import replace

import pytest
import torch

from kernels.index_logits_cases import BATCHES, assert_near, needs_hopper, problem
from kernels.inputs import PROBLEM, index_cache
from vllm_dsv32.kernels import index_logits, index_logits_gluon, index_logits_triton, warmup
from vllm_dsv32.kernels.dispatch import explain
from vllm_dsv32.kernels.index_logits_gluon import Tiling, tiling
from vllm_dsv32.layout import index_key_views

UNWRITTEN = 12345.0
NUM_SMS = 132

TILINGS = {
    "as chosen": None,
    **{
        f"{rows} rows, {splits} splits": Tiling(rows, splits, 168 if rows == 2 else None)
        for rows in (2, 4)
        for splits in (1, 3, 50)
    },
}


@pytest.fixture(params=TILINGS.values(), ids=TILINGS)
def scored(request, monkeypatch):
    """The kernel in a tiling, on memory in which one sees what was written; and whether it was."""

    def new_logits(num_rows, max_num_keys, device):
        pitch = -(-max_num_keys // 16) * 16
        return torch.full((num_rows, pitch), UNWRITTEN, device=device)[:, :max_num_keys]

    monkeypatch.setattr(index_logits_triton, "new_logits", new_logits)
    if request.param is not None:
        monkeypatch.setattr(index_logits_gluon, "tiling", lambda *_: request.param)
    return index_logits_gluon.index_logits


def assert_right(kernel, arguments):
    q, weights, *rest, num_keys, width = arguments
    got = kernel(*arguments)
    visible = torch.arange(width, device="cuda") < num_keys.unsqueeze(1)
    assert bool((got[~visible] == UNWRITTEN).all())
    assert bool((got._base[:, width:] == UNWRITTEN).all())
    magnitude = index_logits.reference(q, weights.abs(), *rest, num_keys, width)[visible]
    assert_near(got[visible], index_logits.reference(*arguments)[visible], 1e-3 * magnitude)
    # The Triton kernel has the same products, and sums them in another order.
    assert_near(got[visible], index_logits_triton.index_logits(*arguments)[visible], 1e-5 * magnitude)
    for _ in range(20):
        again = kernel(*arguments)
        assert torch.equal(again.view(torch.int32), got.view(torch.int32))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@needs_hopper
def test_rows_and_keys_around_tiles(scored, batch):
    assert_right(scored, problem(batch))


@pytest.mark.parametrize("gap_nbytes", [16, 128, 33_792])
@pytest.mark.parametrize("block_size", [64, 128, 192])
@needs_hopper
def test_other_and_interleaved_pages(scored, block_size, gap_nbytes):
    assert_right(scored, problem(BATCHES["all kinds"], block_size, gap_nbytes))


@needs_hopper
def test_what_is_not_finite_stays_where_it_is(scored):
    """Of a key and of a scale its column, of a query and of a weight its row."""
    q, weights, cache, table, ids, keys, width = problem([(0, 6, 300), (1, 5, 200)])
    views = index_key_views(cache)
    views.key_fp8.view(torch.uint8)[int(table[0, 0]), 2, 5] = 0x7F
    views.key_fp8.view(torch.uint8)[int(table[0, 2]), 63, 127] = 0xFF
    views.key_scale[int(table[1, 1]), 0] = torch.nan
    q.view(torch.uint8)[1, 63, 7] = 0x7F
    weights[3, 0] = torch.nan
    # Of which the product is one value of the key: no rounding decides on which side of zero it lies.
    for row, weight in ((4, -torch.inf), (8, torch.inf)):
        q[row, 5] = torch.zeros(128).to(torch.float8_e4m3fn)
        q[row, 5, 0] = 1.0
        weights[row, 5] = weight
    arguments = (q, weights, cache, table, ids, keys, width)
    assert_right(scored, arguments)
    got = scored(*arguments)
    assert bool(got[0, [2, 191]].isnan().all())
    assert int(got[0, : keys[0]].isnan().sum()) == 2
    assert bool(got[1, : keys[1]].isnan().all())
    assert bool(got[3, : keys[3]].isnan().all())
    assert bool(got[4].isneginf().any())
    assert bool(got[8].isposinf().any())


@pytest.mark.parametrize("num_heads", [32, 128])
def test_other_numbers_of_heads_are_refused(num_heads):
    """The table says what the kernel says."""
    refusal = refusal_of(replace(PROBLEM, num_index_heads=num_heads))
    assert refusal == f"takes 64 index heads, got {num_heads}"
    one = torch.zeros(1, 1).int()
    q = torch.zeros(1, num_heads, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"takes 64 heads, got {num_heads}"):
        index_logits_gluon.index_logits(q, q[..., 0].float(), index_cache(1, 64), one, one[0], one[0], 1)


def test_the_table_offers_it_on_hopper_only():
    served = replace(PROBLEM, num_index_heads=index_logits_gluon.NUM_HEADS)
    for cache_format in ("auto", "fp8_ds_mla"):
        assert refusal_of(replace(served, cache_format=cache_format, num_heads=128)) is None
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        got = ".".join(map(str, capability))
        assert refusal_of(replace(served, capability=capability)) == f"takes compute capability 9.0, got {got}"


def refusal_of(problem):
    (refusal,) = (refusal for row, refusal in explain("index_logits", problem) if row.name == "gluon")
    return refusal


@pytest.mark.parametrize(
    ("num_rows", "num_requests", "block_size", "gap_nbytes", "offset"),
    [
        (0, 1, 64, 0, 0),
        (3, 3, 64, 0, 0),
        (5, 3, 64, 0, 0),
        (8, 2, 48, 0, 0),
        (8, 2, 64, 4, 0),
        (8, 2, 64, 0, 4),
    ],
    ids=["empty", "decode", "few drafts", "blocks", "page stride", "first page"],
)
def test_what_is_left_to_triton(monkeypatch, num_rows, num_requests, block_size, gap_nbytes, offset):
    """With the same arguments, whose result is returned."""
    monkeypatch.setattr(index_logits_triton, "index_logits", lambda *arguments: arguments)
    cache = index_cache(4, block_size, gap_nbytes=gap_nbytes)
    memory = torch.zeros(cache.untyped_storage().nbytes() + 64, dtype=torch.uint8)
    aligned = -memory.data_ptr() % 16
    cache = memory.as_strided(cache.shape, cache.stride(), aligned + offset)
    per_row = torch.zeros(num_rows, dtype=torch.int32)
    arguments = (
        torch.zeros(num_rows, 64, 128).to(torch.float8_e4m3fn),
        torch.zeros(num_rows, 64),
        cache,
        torch.zeros(num_requests, 2, dtype=torch.int32),
        per_row,
        per_row,
        70,
    )
    assert all(
        got is given for got, given in zip(index_logits_gluon.index_logits(*arguments), arguments, strict=True)
    )


@pytest.mark.parametrize(
    ("num_rows", "num_requests", "wanted"),
    [
        (64, 64, None),
        (65, 64, None),
        (128, 64, Tiling(2, 12, 168)),
        (192, 64, Tiling(2, 11, 168)),
        (256, 64, Tiling(4, 8, None)),
        (300, 1, Tiling(4, 7, None)),
        (1024, 256, Tiling(4, 4, None)),
        (8192, 1, Tiling(4, 1, None)),
        (8192, 300, Tiling(4, 1, None)),
    ],
)
def test_how_batches_are_tiled(num_rows, num_requests, wanted):
    assert tiling(num_rows, num_requests, NUM_SMS) == wanted


def test_warming_up_compiles_every_tiling():
    def kernels(batches):
        tilings = (tiling(num_tokens, num_requests, NUM_SMS) for num_requests, num_tokens in batches)
        return {tiles and (tiles.num_rows, tiles.max_registers) for tiles in tilings}

    warmed = kernels(warmup._batches(8192, 256))
    assert warmed == kernels((r, n) for r in range(1, 257) for n in (*range(r, 9 * r), 8192))
    compiled = {(c.constexprs["ROWS"], c.max_registers) for c in index_logits_gluon.compilations((9, 0))}
    assert warmed == {None} | compiled
