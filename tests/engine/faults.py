"""Mistakes that implementations of this model have made, as replacements of kernels.

Each function gives arguments for ``harness.kernels_replaced``.
"""

import torch

from vllm_dsv32.kernels import index_insert
from vllm_dsv32.kernels.latent_insert import rms_norm
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.layout import index_key_views, latent_fp8_views

# Pairs (i, i + 32) as neighbours: rotating interleaved after this reordering rotates halves.
HALVES_AS_PAIRS = torch.arange(64).reshape(2, 32).T.flatten()


def places(keys):
    """Block and offset of each token in its cache."""
    block_size = keys.cache.shape[1]
    return keys.slots // block_size, keys.slots % block_size


def index_rope_interleaved():
    def prepare(original):
        return lambda positions, table, _layout, *parts: original(positions, table, RopeLayout.INTERLEAVED, *parts)

    return {"keys_and_queries": prepare}


def mla_rope_as_halves():
    def prepare(original):
        def sabotaged(positions, table, layout, latents, index_keys, index_queries, mla_queries):
            latents = latents._replace(k_pe=latents.k_pe[:, HALVES_AS_PAIRS])
            nope, rope = mla_queries.q.split([mla_queries.w_uk_t.shape[1], 64], dim=-1)
            mla_queries = mla_queries._replace(q=torch.cat((nope, rope[..., HALVES_AS_PAIRS]), dim=-1))
            return original(positions, table, layout, latents, index_keys, index_queries, mla_queries)

        return sabotaged

    return {"keys_and_queries": prepare}


def relu_after_the_sum():
    def logits(_original):
        def sabotaged(q_fp8, weights, cache, block_table, request_ids, num_keys, width):
            views = index_key_views(cache)
            keys = (views.key_fp8.float() * views.key_scale.unsqueeze(-1))[block_table[request_ids].long()]
            keys = keys.flatten(1, 2)[:, :width]
            keys = torch.nn.functional.pad(keys, (0, 0, 0, width - keys.shape[1]))
            scores = torch.relu(torch.einsum("th,thd,tsd->ts", weights, q_fp8.float(), keys))
            return scores.masked_fill(torch.arange(width) >= num_keys.unsqueeze(-1), -torch.inf)

        return sabotaged

    return {"index_logits": logits}


def k_norm_without_bias():
    def prepare(original):
        def sabotaged(positions, table, layout, latents, index_keys, *queries):
            index_keys = index_keys._replace(norm_bias=torch.zeros_like(index_keys.norm_bias))
            return original(positions, table, layout, latents, index_keys, *queries)

        return sabotaged

    return {"keys_and_queries": prepare}


def topk_off_by_one():
    def select(original):
        def sabotaged(*args):
            *rest, topk_slot = args
            fewer = torch.empty_like(topk_slot[:, 1:])
            original(*rest, fewer)
            topk_slot[:, :-1] = fewer
            topk_slot[:, -1] = -1

        return sabotaged

    def attend(original):
        def sabotaged(q, cache, topk_slot, num_selected, scale):
            return original(q, cache, topk_slot, num_selected.clamp(max=topk_slot.shape[1] - 1), scale)

        return sabotaged

    return {"topk_select": select, "sparse_mla": attend}


def latent_scale_per_row():
    def prepare(original):
        def sabotaged(positions, table, layout, latents, *others):
            queries = original(positions, table, layout, latents, *others)
            latent = rms_norm(latents.kv_c, latents.norm_weight, latents.norm_eps)
            scale = latent.abs().amax(dim=-1, keepdim=True) / 448
            views, at = latent_fp8_views(latents.cache), places(latents)
            views.nope_fp8.view(torch.uint8)[at] = (latent / scale).to(torch.float8_e4m3fn).view(torch.uint8)
            views.nope_scale[at] = scale.expand(-1, 4)
            return queries

        return sabotaged

    return {"keys_and_queries": prepare}


def index_rotates_only_q():
    def prepare(original):
        def sabotaged(positions, table, layout, latents, index_keys, *queries):
            queries = original(positions, table, layout, latents, index_keys, *queries)
            still = torch.zeros_like(table)
            still[:, : table.shape[1] // 2] = 1
            index_insert.reference(index_keys, positions, still, layout)
            return queries

        return sabotaged

    return {"keys_and_queries": prepare}


def random_selection():
    def select(original):
        return lambda logits, *rest: original(torch.rand_like(logits), *rest)

    return {"topk_select": select}


def stale_topk_buffer():
    """Each layer reads what the one before it selected."""
    selections = []

    def select(original):
        def sabotaged(*args):
            *rest, topk_slot = args
            selections.append(torch.empty_like(topk_slot))
            original(*rest, selections[-1])
            stale = selections.pop(0) if len(selections) > 1 else selections[-1]
            # A step of another size has nothing to do with this one.
            topk_slot.copy_(stale if stale.shape == topk_slot.shape else selections[-1])

        return sabotaged

    return {"topk_select": select}


def index_scale_in_nominal_row():
    """Written where the cache's nominal shape suggests it, behind each key; a page has all of them at its end."""

    def prepare(original):
        def sabotaged(positions, table, layout, latents, index_keys, *queries):
            queries = original(positions, table, layout, latents, index_keys, *queries)
            views, at = index_key_views(index_keys.cache), places(index_keys)
            scale = views.key_scale[at].clone()
            views.key_scale[at] = 0
            index_keys.cache[(*at, slice(128, 132))] = scale.unsqueeze(-1).view(torch.uint8)
            return queries

        return sabotaged

    return {"keys_and_queries": prepare}
