"""The queries of attention and of the indexer, and mla_output."""

import pytest
import torch

from kernels import naive
from kernels.inputs import close, cos_sin_cache, implementations
from kernels.parts import implementations_of_part
from vllm_dsv32.kernels import index_query, mla_query
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.rope import RopeLayout


@pytest.mark.parametrize(("tokens", "heads", "nope"), [(0, 4, 128), (1, 1, 128), (7, 5, 128), (3, 2, 192)])
@implementations_of_part(MlaQueries)
def test_mla_query(kernel, generator, tokens, heads, nope):
    q = torch.randn(tokens, heads, nope + 64, generator=generator)
    w_uk_t = torch.randn(heads, nope, 512, generator=generator) * nope**-0.5
    positions, table = torch.arange(tokens) * 11, cos_sin_cache()
    got = kernel(MlaQueries(q, w_uk_t), positions, table)
    assert got.shape == (tokens, heads, 576)
    assert got.dtype == q.dtype
    expected = torch.zeros(tokens, heads, 576, dtype=torch.float64)
    for t in range(tokens):
        for h in range(heads):
            expected[t, h, :512] = q[t, h, :nope].double() @ w_uk_t[h].double()
            rotated = naive.rope(q[t, h, nope:].double().tolist(), table[positions[t]].double().tolist(), True)
            expected[t, h, 512:] = torch.tensor(rotated)
    close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", RopeLayout)
@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (1, 1), (5, 6)])
@implementations_of_part(IndexQueries)
def test_index_query(kernel, generator, tokens, heads, layout):
    index_q = torch.randn(tokens, heads, 128, generator=generator).bfloat16()
    head_weights = torch.randn(tokens, heads, generator=generator)
    positions, table = torch.arange(tokens) * 11, cos_sin_cache()
    q_fp8, weights = kernel(IndexQueries(index_q, head_weights), positions, table, layout)
    assert (q_fp8.shape, q_fp8.dtype) == ((tokens, heads, 128), torch.float8_e4m3fn)
    assert (weights.shape, weights.dtype) == ((tokens, heads), torch.float32)
    for t in range(tokens):
        cos_sin = table[positions[t]].double().tolist()
        for h in range(heads):
            row = index_q[t, h].double().tolist()
            wanted = naive.rope(row[:64], cos_sin, layout is RopeLayout.INTERLEAVED) + row[64:]
            scale = naive.power_of_two_scale(wanted)
            codes = q_fp8[t, h].view(torch.uint8).tolist()
            differing = sum(
                abs(naive.e4m3_decode(code) - naive.e4m3_decode(naive.e4m3_encode(value / scale))) > 0
                for code, value in zip(codes, wanted, strict=True)
            )
            assert differing <= 1, "more than a value in the middle of two codes"
            folded = float(head_weights[t, h]) * scale * heads**-0.5 * 128**-0.5
            assert float(weights[t, h]) == pytest.approx(folded, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "v"), [(0, 4, 128), (1, 1, 128), (7, 5, 128), (3, 2, 64)])
@implementations("mla_output")
def test_mla_output(kernel, generator, tokens, heads, v, dtype):
    latent = torch.randn(tokens, heads, 512, generator=generator).to(dtype)
    w_uv = (torch.randn(heads, 512, v, generator=generator) * 512**-0.5).to(dtype)
    output = torch.full((tokens, heads * v), torch.nan, dtype=dtype)
    kernel(latent, w_uv, output)
    expected = torch.zeros(tokens, heads, v, dtype=torch.float64)
    for t in range(tokens):
        for h in range(heads):
            expected[t, h] = latent[t, h].double() @ w_uv[h].double()
    rtol = 1e-4 if dtype == torch.float32 else 2**-8
    close(output, expected.reshape(tokens, heads * v), rtol=rtol, atol=1e-4)


# Around the rows that one program takes, with as many heads as there are and with numbers that divide nothing.
NUM_ROWS = [(1, 64), (1, 128), (3, 5), (4, 4), (17, 1), (11, 3), (2, 16)]


@pytest.mark.parametrize("layout", RopeLayout)
@pytest.mark.parametrize(("tokens", "heads"), NUM_ROWS)
@implementations_of_part(IndexQueries)
def test_index_query_is_the_references_to_the_bit(kernel, generator, tokens, heads, layout):
    # Rows of magnitudes from far below the quantisation's floor to far above 448.
    magnitudes = torch.exp(4 * torch.randn(tokens, heads + 2, 1, generator=generator))
    index_q = (magnitudes * torch.randn(tokens, heads + 2, 128, generator=generator)).bfloat16()[:, 1:-1]
    index_q[0, 0] = 0.0
    head_weights = torch.randn(tokens, heads + 3, generator=generator)[:, :heads]
    positions = torch.randint(0, 300, (tokens,), generator=generator)
    index_queries = IndexQueries(index_q, head_weights)
    q_fp8, weights = kernel(index_queries, positions, cos_sin_cache(), layout)
    wanted_fp8, wanted_weights = index_query.reference(index_queries, positions, cos_sin_cache(), layout)
    assert torch.equal(q_fp8.view(torch.uint8), wanted_fp8.view(torch.uint8))
    assert torch.equal(weights, wanted_weights)


@pytest.mark.parametrize("dim", [0, 40, 100])
@implementations_of_part(IndexQueries)
def test_an_index_query_that_is_nan_spoils_its_scores_and_no_others(kernel, generator, dim):
    index_q = torch.randn(1, 3, 128, generator=generator)
    index_q[0, 1, dim] = torch.nan
    index_queries = IndexQueries(index_q, torch.ones(1, 3))
    q_fp8, weights = kernel(index_queries, torch.tensor([0]), cos_sin_cache(), RopeLayout.NEOX)
    scores = q_fp8.float().sum(-1) * weights
    assert scores.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads"), NUM_ROWS)
@implementations_of_part(MlaQueries)
def test_mla_query_is_the_references(kernel, generator, tokens, heads, dtype):
    q = torch.randn(tokens, heads + 1, 192, generator=generator).to(dtype)[:, 1:]
    w_uk_t = (torch.randn(heads, 128, 512, generator=generator) * 128**-0.5).to(dtype)
    positions = torch.randint(0, 300, (tokens,), generator=generator)
    mla_queries = MlaQueries(q, w_uk_t)
    got = kernel(mla_queries, positions, cos_sin_cache())
    wanted = mla_query.reference(mla_queries, positions, cos_sin_cache())
    assert torch.equal(got[..., 512:], wanted[..., 512:])
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-7, 1e-3)
    close(got[..., :512], wanted[..., :512], rtol=rtol, atol=atol)
    assert torch.equal(got, kernel(mla_queries, positions, cos_sin_cache()))


# Around the tokens that a program absorbs, and from which on it is another's work; heads of a rank and of a model.
ABSORBED = [
    (1, 16),
    (2, 1),
    (2, 128),
    (15, 1),
    (16, 8),
    (17, 1),
    (31, 3),
    (32, 17),
    (33, 17),
    (64, 16),
    (128, 1),
    (129, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "heads", "nope"), [(*case, 128) for case in ABSORBED] + [(5, 2, nope) for nope in (32, 80, 192)]
)
@implementations_of_part(MlaQueries)
def test_absorbed_queries_are_rounded_once(kernel, generator, tokens, heads, nope, dtype):
    q = torch.randn(tokens, heads, nope + 64, generator=generator).to(dtype)
    w_uk_t = (torch.randn(heads, nope, 512, generator=generator) * nope**-0.5).to(dtype)
    exact = torch.einsum("tnd,ndc->tnc", q[..., :nope].double(), w_uk_t.double())
    got = kernel(MlaQueries(q, w_uk_t), torch.zeros(tokens, dtype=torch.int64), cos_sin_cache())
    close(got[..., :512], exact, rtol=max(torch.finfo(dtype).eps / 2, 1e-6), atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 20])
@implementations_of_part(MlaQueries)
def test_weights_are_absorbed_where_they_lie(kernel, generator, tokens):
    """As a part of the layer's weight, which holds values' weights too, and with its columns far apart."""
    q = torch.randn(tokens, 2, 192, generator=generator).bfloat16()
    per_head = (torch.randn(2, 128 + 64, 512, generator=generator) * 128**-0.5).bfloat16()
    positions, table = torch.arange(tokens), cos_sin_cache()
    w_uk_t = per_head[:, :128]
    dense = kernel(MlaQueries(q, w_uk_t.contiguous()), positions, table)
    assert torch.equal(kernel(MlaQueries(q, w_uk_t), positions, table), dense)
    apart = w_uk_t.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kernel(MlaQueries(q, apart), positions, table), dense)


@pytest.mark.parametrize("tokens", [3, 33])
@implementations_of_part(MlaQueries)
def test_a_query_that_is_nan_spoils_no_others(kernel, generator, tokens):
    q = torch.randn(tokens, 3, 192, generator=generator).bfloat16()
    q[1, 2, 7] = torch.nan
    w_uk_t = torch.ones(3, 128, 512).bfloat16()
    mla_q = kernel(MlaQueries(q, w_uk_t), torch.arange(tokens), cos_sin_cache())
    assert mla_q[1, 2, :512].isnan().all()
    assert mla_q.isnan().sum() == 512


@implementations_of_part(MlaQueries)
def test_what_is_rotated_is_not_absorbed(kernel, generator):
    """Behind the 80 values that are, the programs' last 64 go on."""
    q = torch.randn(3, 2, 80 + 64, generator=generator).bfloat16()
    q[..., 80:] = torch.nan
    mla_q = kernel(MlaQueries(q, torch.ones(2, 80, 512).bfloat16()), torch.arange(3), cos_sin_cache())
    assert not mla_q[..., :512].isnan().any()
    assert mla_q[..., 512:].isnan().all()


@implementations("mla_output")
def test_mla_output_into_part_of_a_tensor(kernel, generator):
    """Rows behind it are padding, columns beside it another's."""
    latent, w_uv = torch.randn(3, 2, 512, generator=generator), torch.randn(2, 512, 64, generator=generator)
    whole, dense = torch.full((5, 200), 7.0), torch.empty(3, 128)
    kernel(latent, w_uv, whole[:3, :128])
    kernel(latent, w_uv, dense)
    assert torch.equal(whole[:3, :128], dense)
    assert bool((whole[3:] == 7.0).all())
    assert bool((whole[:, 128:] == 7.0).all())
