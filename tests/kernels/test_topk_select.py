import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import naive
from kernels.inputs import implementations
from vllm_dsv32.kernels import topk_select


def select(kernel, logits: torch.Tensor, num_keys: list[int], k: int) -> torch.Tensor:
    out = torch.full((len(num_keys), k), 12345, dtype=torch.int32)
    kernel(logits, torch.tensor(num_keys, dtype=torch.int32), out)
    return out


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


@implementations("topk_select")
def test_no_rows(kernel):
    assert select(kernel, torch.empty(0, 16), [], 4).shape == (0, 4)


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
