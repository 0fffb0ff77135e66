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
