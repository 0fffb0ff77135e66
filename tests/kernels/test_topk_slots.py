import pytest
import torch

from kernels.inputs import implementations

TABLE = torch.tensor([[9, 4, 6], [1, 0, 3]], dtype=torch.int32)


@pytest.mark.parametrize("block_size", [16, 64, 128])
@implementations("topk_slots")
def test_translation(kernel, block_size):
    pos = [[0, 1, block_size - 1, block_size], [2 * block_size, 3 * block_size - 1, -1, -1], [-1, -1, -1, -1]]
    requests = [0, 1, 1]
    slots, num_valid = kernel(
        torch.tensor(pos, dtype=torch.int32), torch.tensor(requests, dtype=torch.int32), TABLE, block_size
    )
    expected = [
        [-1 if p < 0 else int(TABLE[r, p // block_size]) * block_size + p % block_size for p in row]
        for r, row in zip(requests, pos, strict=True)
    ]
    assert slots.dtype == num_valid.dtype == torch.int32
    assert slots.tolist() == expected
    assert num_valid.tolist() == [4, 2, 0]


@implementations("topk_slots")
def test_no_tokens(kernel):
    slots, num_valid = kernel(torch.empty(0, 8, dtype=torch.int32), torch.empty(0, dtype=torch.int32), TABLE, 16)
    assert slots.shape == (0, 8)
    assert num_valid.shape == (0,)


@pytest.mark.parametrize("k", [1, 5, 2048])
@implementations("topk_slots")
def test_rows_of_a_chunk(kernel, generator, k):
    """Rows that begin anywhere in larger buffers; the blocks of a request end where its positions do."""
    num_valid = torch.tensor([k, k - 1, 0, k // 2, k])
    pos = torch.randint(0, 3 * 16, (5, k + 3), generator=generator, dtype=torch.int32)[:, :k]
    pos[torch.arange(k) >= num_valid.unsqueeze(1)] = -1
    table = torch.full((2, 7), 2**31 - 1, dtype=torch.int32)
    table[:, :3] = TABLE
    requests = torch.tensor([9, 1, 0, 0, 1, 1], dtype=torch.int32)[1:]
    slots, got_valid = kernel(pos, requests, table, 16)
    blocks = TABLE[requests.long().unsqueeze(1), pos.clamp(min=0) // 16]
    assert torch.equal(slots, torch.where(pos < 0, -1, blocks * 16 + pos % 16))
    assert torch.equal(got_valid, num_valid.to(torch.int32))
