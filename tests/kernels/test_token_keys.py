import pytest
import torch

from kernels.inputs import implementations
from vllm_dsv32.kernels.token_keys import reference

# (query length, sequence length) of each request, tokens of padding behind them.
BATCHES = {
    "one prefill": ([(5, 5)], 0),
    "chunked prefill": ([(5, 12)], 0),
    "decode": ([(1, 9), (1, 1), (1, 300)], 0),
    "speculative decode": ([(3, 9), (3, 20)], 0),
    "mixed": ([(1, 9), (4, 4), (2, 30), (1, 1)], 0),
    "padded tokens": ([(1, 9), (1, 4)], 3),
    "padded requests, as in graphs": ([(1, 9), (0, 0), (0, 0)], 2),
    "zero lengths, as in graph capture": ([(1, 0), (1, 0)], 0),
    "an idle rank": ([(0, 0)], 1),
    "more requests and tokens than a tile": ([(1 + i % 3, 1 + 2 * i) for i in range(150)], 7),
    "requests without tokens among others": ([(0, 5), (2, 9), (0, 3), (0, 1), (130, 140)], 1),
}


@pytest.mark.parametrize("topk", [1, 8, 2048])
@pytest.mark.parametrize(("requests", "padding"), BATCHES.values(), ids=BATCHES)
@implementations("token_keys")
def test_every_token_knows_its_request_and_its_keys(kernel, requests, padding, topk):
    starts = [0]
    expected = []
    for index, (query_length, sequence_length) in enumerate(requests):
        starts.append(starts[-1] + query_length)
        expected += [(index, max(0, sequence_length - query_length + i + 1)) for i in range(query_length)]
    num_tokens = starts[-1] + padding
    request_ids, num_keys, num_scored, num_selected = (
        torch.full((num_tokens + 3,), -7, dtype=torch.int32) for _ in range(4)
    )
    kernel(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([length for _, length in requests], dtype=torch.int32),
        topk,
        request_ids[:num_tokens],
        num_keys[:num_tokens],
        num_scored[:num_tokens],
        num_selected[:num_tokens],
    )
    assert list(zip(request_ids.tolist(), num_keys.tolist(), strict=True))[: starts[-1]] == expected
    assert num_keys[starts[-1] : num_tokens].tolist() == [0] * padding
    assert request_ids[starts[-1] : num_tokens].tolist() == [len(requests) - 1] * padding
    assert num_scored[:num_tokens].tolist() == [n if n > topk else 0 for n in num_keys[:num_tokens].tolist()]
    assert num_selected[:num_tokens].tolist() == [min(n, topk) for n in num_keys[:num_tokens].tolist()]
    for written in (request_ids, num_keys, num_scored, num_selected):
        assert written[num_tokens:].tolist() == [-7] * 3


@implementations("token_keys")
def test_no_tokens(kernel):
    empty = torch.empty(0, dtype=torch.int32)
    kernel(torch.tensor([0, 0], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), 4, *[empty] * 4)


def test_the_reference_does_not_wait_for_the_device():
    """On the meta device every read of a value raises."""
    with torch.device("meta"):
        reference(
            *(torch.empty(n, dtype=torch.int32) for n in (4, 3)), 8, *(torch.empty(7).int() for _ in range(4))
        )
