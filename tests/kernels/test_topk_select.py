import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import naive
from kernels.inputs import implementations, on_device
from vllm_dsv32.kernels import topk_select, topk_select_triton
from vllm_dsv32.kernels.topk_select_triton import SCRATCH_NBYTES, Tiling


def select(kernel, logits: torch.Tensor, num_keys: list[int], k: int) -> torch.Tensor:
    """Positions: slots of one request, whose pages lie in their order."""
    pages = torch.arange(-(-logits.shape[1] // 16), dtype=torch.int32).unsqueeze(0)
    return select_slots(kernel, logits, num_keys, [0] * len(num_keys), pages, 16, k)


def select_slots(kernel, logits, num_keys, request_ids, block_table, block_size, k) -> torch.Tensor:
    out = torch.full((len(num_keys), k), 12345, dtype=torch.int32)
    num_keys, request_ids = (torch.tensor(x, dtype=torch.int32) for x in (num_keys, request_ids))
    kernel(logits, num_keys, request_ids, block_table, block_size, out)
    return out


POISON = 2**31 - 1


def scrambled_table(num_requests: int, num_blocks: int, generator: torch.Generator) -> torch.Tensor:
    """Pages in any order, each of one request; behind them, and between the rows, what is no page."""
    table = torch.full((num_requests, num_blocks + 7), POISON, dtype=torch.int32)[:, : num_blocks + 2]
    pages = torch.randperm(num_requests * num_blocks, generator=generator).int()
    table[:, :num_blocks] = pages.view(num_requests, num_blocks)
    return table


@pytest.mark.parametrize("k", [1, 2, 8, 64, 2048])
@pytest.mark.parametrize("width", [1, 7, 63, 64, 65, 300])
@implementations("topk_select")
def test_random_rows(kernel, generator, width, k):
    num_keys = sorted({0, 1, width // 2, max(0, width - 1), width} | {min(width, n) for n in (k - 1, k, k + 1)})
    logits = torch.randn(len(num_keys), width, generator=generator)
    for row, seen in enumerate(num_keys):
        logits[row, seen:] = math.nan  # never read
    got = select(kernel, logits, num_keys, k)
    assert torch.equal(got, naive.topk(logits, torch.tensor(num_keys), k))
    assert torch.equal(got, select(kernel, logits, num_keys, k))


ADVERSARIAL = {
    "all equal": [0.0] * 9,
    "all minus infinity": [-math.inf] * 9,
    "minus infinity among values": [1.0, -math.inf, 0.5, -math.inf, 2.0, -math.inf, -3.0, 0.0, -1.0],
    "NaN ranks with minus infinity": [math.nan, 1.0, math.nan, -math.inf, 2.0, -5.0, math.nan, 0.0, 3.0],
    "both zeros are equal": [0.0, -0.0, 0.0, -0.0, 1.0, -0.0, 0.0, -1.0, 0.0],
    "plus infinity": [math.inf, 1.0, math.inf, 2.0, math.inf, 3.0, 0.0, 0.0, 0.0],
    "ties across the boundary": [5.0, 4.0, 4.0, 4.0, 4.0, 6.0, 4.0, 4.0, 3.0],
}


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 9, 10])
@pytest.mark.parametrize("row", ADVERSARIAL.values(), ids=ADVERSARIAL)
@implementations("topk_select")
def test_ties_and_sentinels(kernel, row, k):
    logits = torch.tensor([row])
    assert torch.equal(select(kernel, logits, [9], k), naive.topk(logits, torch.tensor([9]), k))


@implementations("topk_select")
def test_lower_positions_win_ties(kernel):
    assert select(kernel, torch.tensor([[1.0, 2.0, 2.0, 2.0]]), [4], 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf, 0.0])
@implementations("topk_select")
def test_of_short_rows_all_is_selected_whatever_lies_there(kernel, generator, content):
    logits = torch.full((4, 40), content)
    logits[3] = torch.randn(40, generator=generator)
    got = select(kernel, logits, [0, 3, 8, 40], 8)
    assert got[:3].tolist() == [[*range(n), *[-1] * (8 - n)] for n in (0, 3, 8)]
    assert torch.equal(got[3:], naive.topk(logits[3:], torch.tensor([40]), 8))


@implementations("topk_select")
def test_no_rows(kernel):
    assert select(kernel, torch.empty(0, 16), [], 4).shape == (0, 4)


@pytest.mark.parametrize("k", [5, 64, 300])
@pytest.mark.parametrize("block_size", [16, 64, 128])
@implementations("topk_select")
def test_slots_of_several_requests(kernel, generator, block_size, k):
    """The last block of each is partly filled; the next ones are no pages, though a row may be as long as that."""
    length = 2 * block_size + 5
    num_keys = [length, 0, 1, block_size, block_size + 1, length - 1, min(k, length), length]
    request_ids = [2, 0, 1, 1, 0, 2, 2, 0]
    table = scrambled_table(3, 3, generator)
    logits = torch.randn(len(num_keys), length + 4 * block_size, generator=generator)
    for row, seen in enumerate(num_keys):
        logits[row, seen - 1] = 99.0  # at the very end
        logits[row, seen:] = math.inf  # never seen
    got = select_slots(kernel, logits, num_keys, request_ids, table, block_size, k)
    positions = naive.topk(logits, torch.tensor(num_keys), k)
    assert torch.equal(got, naive.slots(positions, torch.tensor(request_ids), table, block_size))
    assert torch.equal((got >= 0).sum(1), torch.tensor(num_keys).clamp(max=k))
    again = select_slots(kernel, logits, num_keys, request_ids, table, block_size, k)
    assert torch.equal(got, again)


@pytest.mark.parametrize("k", [8, 64])
@implementations("topk_select")
def test_rows_of_a_chunk_write_nothing_else(kernel, generator, k):
    """Tensors that begin anywhere in larger ones, as a chunk's rows and a step's tokens do."""
    num_keys = torch.tensor([50, 99, 3, 64, 50], dtype=torch.int32)[1:]
    request_ids = torch.tensor([9, 1, 0, 0, 1], dtype=torch.int32)[1:]
    table = scrambled_table(2, 7, generator)
    logits = torch.randn(4, 99, generator=generator)
    out = torch.full((6, k + 3), 12345, dtype=torch.int32)
    kernel(logits, num_keys, request_ids, table, 16, out[1:5, :k])
    assert torch.equal(out[1:5, :k], naive.slots(naive.topk(logits, num_keys, k), request_ids, table, 16))
    out[1:5, :k] = 12345
    assert (out == 12345).all()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_small_row(data):
    width = data.draw(st.integers(1, 12))
    row = data.draw(
        st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, math.nan]), min_size=width, max_size=width)
    )
    seen, k = data.draw(st.integers(0, width)), data.draw(st.integers(1, 14))
    logits = torch.tensor([row])
    got = select(topk_select.reference, logits, [seen], k)
    assert torch.equal(got, naive.topk(logits, torch.tensor([seen]), k))


def tiling_of_parts(*splits: int, num_lone_rows: int = 0) -> Tiling:
    tiles = topk_select_triton.tiling(None)
    return dataclasses.replace(
        tiles,
        tile=32,
        sample=16,
        num_programs=3,
        num_split_programs=3 * max(splits, default=1),
        splits=splits,
        num_lone_rows=num_lone_rows,
        num_lone_warps=2,
    )


TILINGS = {
    "whole rows": tiling_of_parts(),
    "2 parts": tiling_of_parts(2, num_lone_rows=99),
    "8 parts": tiling_of_parts(8),
}
"""All of lists of 64 keys for a K below 17."""


def kinds_of_rows(width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    normal = torch.randn(width, generator=generator)
    sampled = torch.zeros(width, dtype=torch.bool)
    sampled.view(-1, 4)[torch.arange(4) * (width // 4) // 4] = True
    few_values = torch.randint(-1, 2, (width,), generator=generator).float()
    return {
        "random": normal,
        "rising: each key displaces one": normal.sort().values,
        "falling: none does": normal.sort(descending=True).values,
        "ties within and across tiles": few_values,
        "of every magnitude": normal * 10.0 ** torch.linspace(-42, 38, width),
        "from the lowest to the highest": normal.sign() * torch.finfo(torch.float32).max,
        "infinities at both ends": torch.where(normal.abs() > 1, normal * math.inf, normal),
        "all equal": torch.full((width,), -0.0),
        "all NaN": torch.full((width,), math.nan),
        "mostly minus infinity": torch.where(normal > 1.8, normal, -math.inf),
        "one part has all": torch.where((torch.arange(width) // 40) == 3, normal + 50, normal),
        "a sample above the rest": torch.where(sampled, 9.0, normal),
        "a sample below the rest": torch.where(sampled, -9.0, normal),
        "one value apart from a tie": torch.where(torch.arange(width) == width - 1, 1e-45, 0.0),
    }


@pytest.fixture(params=TILINGS.values(), ids=TILINGS)
def tiled(request, monkeypatch):
    monkeypatch.setattr(topk_select_triton, "tiling", lambda capability: request.param)
    return on_device(topk_select_triton.topk_select)


def test_any_kind_of_row_in_any_tiling(tiled, generator):
    rows = kinds_of_rows(200, generator)
    logits = torch.stack(list(rows.values()))
    num_keys = [200] * len(rows)
    expected = naive.topk(logits, torch.tensor(num_keys), 9)
    got = select(tiled, logits, num_keys, 9)
    different = [
        name for name, row, wanted in zip(rows, got, expected, strict=True) if not torch.equal(row, wanted)
    ]
    assert different == []


@pytest.mark.parametrize("pitch", [144, 135])
def test_lengths_at_the_edges_of_tiles_and_lists(tiled, generator, pitch):
    """Most are read again; rows begin at whole words of memory, or not."""
    num_keys = [0, 1, 8, 9, 10, 31, 32, 33, 63, 64, 65, 96, 97, 128, 135]
    logits = torch.randn(len(num_keys), pitch, generator=generator)[:, :135]
    for row, seen in enumerate(num_keys):
        logits[row, seen:] = math.inf
    assert torch.equal(select(tiled, logits, num_keys, 9), naive.topk(logits, torch.tensor(num_keys), 9))


@pytest.fixture
def shortlisted(monkeypatch) -> list[int]:
    """The lengths of rows whose sample misled, under the interpreter."""
    lengths = []
    shortlist = topk_select_triton.shortlist

    def counted(list_ptr, row, seen, *rest):
        lengths.append(int(seen.handle.data[0]))
        return shortlist(list_ptr, row, seen, *rest)

    if not torch.cuda.is_available():
        monkeypatch.setattr(topk_select_triton, "shortlist", counted)
    return lengths


@pytest.mark.parametrize("splits", [(), (4,), (8,)], ids=str)
def test_rows_that_are_read_once(monkeypatch, generator, shortlisted, splits):
    """Most are, if the lists are large for K: with other edges of parts, words and lists than rows read again."""
    tiles = dataclasses.replace(tiling_of_parts(*splits), tile=128, sample=128, num_programs=8)
    tiles = dataclasses.replace(tiles, num_split_programs=8 * max(splits, default=1))
    monkeypatch.setattr(topk_select_triton, "tiling", lambda capability: tiles)
    num_keys = [302, 303, 311, 327, 397, 398, 399, 401]
    logits = torch.randn(len(num_keys), 404, generator=generator)
    for row, seen in enumerate(num_keys):
        logits[row, seen:] = math.inf
    got = select(on_device(topk_select_triton.topk_select), logits, num_keys, 32)
    assert torch.equal(got, naive.topk(logits, torch.tensor(num_keys), 32))
    assert len(shortlisted) < len(num_keys) / 2


def test_slots_in_any_tiling(tiled, generator):
    num_keys, request_ids = [9, 200, 65, 10, 200, 64], [1, 0, 1, 0, 2, 2]
    table = scrambled_table(3, 13, generator)
    logits = torch.randn(len(num_keys), 200, generator=generator)
    got = select_slots(tiled, logits, num_keys, request_ids, table, 16, 9)
    positions = naive.topk(logits, torch.tensor(num_keys), 9)
    assert torch.equal(got, naive.slots(positions, torch.tensor(request_ids), table, 16))


def test_a_list_that_is_short_by_one(tiled):
    logits = torch.zeros(1, 65)
    logits[0, 64] = 1.0
    assert select(tiled, logits, [65], 9).tolist() == [[*range(8), 64]]


@pytest.mark.parametrize("num_split_programs", [0, 512])
def test_real_sizes(monkeypatch, generator, num_split_programs):
    tiles = dataclasses.replace(topk_select_triton.tiling((9, 0)), num_split_programs=num_split_programs)
    monkeypatch.setattr(topk_select_triton, "tiling", lambda capability: tiles)
    num_keys = [40_000, 8192, 2049]
    logits = torch.randn(len(num_keys), 40_000, generator=generator)
    logits[0] = (logits[0] * 100).round()
    table = scrambled_table(3, 625, generator)
    expected, got = (
        select_slots(kernel, logits, num_keys, [1, 0, 2], table, 64, 2048)
        for kernel in (topk_select.reference, on_device(topk_select_triton.topk_select))
    )
    assert torch.equal(got, expected)


def test_a_larger_k_is_refused():
    with pytest.raises(ValueError, match="at most 2048, got 2049"):
        select(topk_select_triton.topk_select, torch.zeros(1, 9), [9], 2049)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_scratch_is_what_the_most_lists_take(monkeypatch, capability):
    taken = []

    class ListKernel:
        def __getitem__(self, grid):
            return lambda _logits, _num_keys, lists, counts, *_, **__: taken.append(lists.nbytes + counts.nbytes)

    tiles = topk_select_triton.tiling(capability)
    monkeypatch.setattr(topk_select_triton, "tiling", lambda _: tiles)
    monkeypatch.setattr(topk_select_triton, "_list_kernel", ListKernel())
    monkeypatch.setattr(topk_select_triton, "_select_kernel", {(n,): lambda *_, **__: None for n in range(5000)})
    with torch.device("meta"):
        for num_rows in (1, 33, 132, 264, 265, 528, 529, 1056, 4096):
            ids, table = torch.zeros(num_rows, dtype=torch.int32), torch.zeros(1, 256, dtype=torch.int32)
            slots = torch.zeros(num_rows, 2048, dtype=torch.int32)
            topk_select_triton.topk_select(torch.zeros(num_rows, 16_384), ids, ids, table, 64, slots)
    assert max(taken) == SCRATCH_NBYTES
