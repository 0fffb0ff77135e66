import pytest
import torch

from vllm_dsv32.attention.metadata import keys_per_token

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
}


@pytest.mark.parametrize(("requests", "padding"), BATCHES.values(), ids=BATCHES)
def test_every_token_knows_its_request_and_its_keys(requests, padding):
    starts = [0]
    expected = []
    for index, (query_length, sequence_length) in enumerate(requests):
        starts.append(starts[-1] + query_length)
        expected += [(index, max(0, sequence_length - query_length + offset + 1)) for offset in range(query_length)]
    num_tokens = starts[-1] + padding
    request_ids, num_keys = keys_per_token(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([length for _, length in requests], dtype=torch.int32),
        torch.arange(num_tokens, dtype=torch.int32),
    )
    assert request_ids.dtype == num_keys.dtype == torch.int32
    assert list(zip(request_ids.tolist(), num_keys.tolist(), strict=True))[: starts[-1]] == expected
    assert num_keys[starts[-1] :].tolist() == [0] * padding
    assert bool((request_ids < len(requests)).all())


def test_nothing_waits_for_the_device():
    """On the meta device every read of a value raises."""
    with torch.device("meta"):
        keys_per_token(
            torch.empty(4, dtype=torch.int32), torch.empty(3, dtype=torch.int32), torch.empty(7, dtype=torch.int32)
        )
