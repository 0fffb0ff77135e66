"""DeepSeek-V3.2 in plain torch, for training: dense attention, dense attention that teaches the indexer, sparse.

Parameters carry the names of the published checkpoint (under ``model.``), so what is trained is saved as it is.
Attention is written out, not absorbed: the training needs its probabilities for the indexer's loss.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Losses", "Mode", "SmallModel"]


class Mode(Enum):
    """The stages of the report."""

    DENSE = "dense"
    """Ordinary attention; the indexer is not run."""
    WARM_UP = "warm-up"
    """Ordinary attention; the indexer learns its distribution."""
    SPARSE = "sparse"
    """Attention over the indexer's top-k; the indexer learns the distribution within them."""


@dataclass
class Losses:
    """Of one batch."""

    language: torch.Tensor
    draft: torch.Tensor
    """The multi-token-prediction layer's."""
    indexer: torch.Tensor
    """KL divergence of the indexer's distribution from attention's, mean over layers and tokens."""
    recall: torch.Tensor
    """Share of the dense attention's mass inside the selection, mean over layers and tokens past top-k (of which
    a short text has none: 0)."""


class RMSNorm(nn.Module):
    """As in the published model, eps 1e-6."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


def frequencies(c: dict[str, Any]) -> torch.Tensor:
    """Radians a position, float64 ``[qk_rope_head_dim / 2]``, under YaRN: the slow ones slowed further."""
    dim, base, yarn = c["qk_rope_head_dim"], c["rope_theta"], c["rope_scaling"]

    def pair_that_turns(times: float) -> float:
        span = yarn["original_max_position_embeddings"] / (times * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(base))

    plain = base ** (-torch.arange(0, dim, 2).double() / dim)
    first = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    last = min(math.ceil(pair_that_turns(yarn["beta_slow"])), dim - 1)
    slowed = ((torch.arange(dim // 2).double() - first) / (last - first)).clamp(0, 1)
    return plain * (1 - slowed) + plain / yarn["factor"] * slowed


def softmax_scale(c: dict[str, Any]) -> float:
    """Of the main attention, with YaRN's temperature."""
    temperature = 0.1 * c["rope_scaling"]["mscale_all_dim"] * math.log(c["rope_scaling"]["factor"]) + 1
    return (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]) ** -0.5 * temperature**2


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Interleaved: the main attention's rotation."""
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """NeoX: the indexer's rotation."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias, drawn from N(0, 1 / inputs)."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


class Indexer(nn.Module):
    """The lightning indexer; its input is detached, so its loss teaches nothing else."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.width = c["index_n_heads"], c["index_head_dim"]
        self.wq_b = linear(c["q_lora_rank"], self.heads * self.width)
        self.wk = linear(c["hidden_size"], self.width)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.weights_proj = linear(c["hidden_size"], self.heads)

    def forward(self, x: torch.Tensor, q_c: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Scores, float32 ``[B, T, T]``, not masked."""
        x, q_c = x.detach(), q_c.detach()
        rotary = 2 * cos.shape[-1]
        q = self.wq_b(q_c).unflatten(-1, (self.heads, self.width))
        q = torch.cat((rotate_halves(q[..., :rotary], cos.unsqueeze(2), sin.unsqueeze(2)), q[..., rotary:]), dim=-1)
        k = self.k_norm(self.wk(x).float()).to(q.dtype)
        k = torch.cat((rotate_halves(k[..., :rotary], cos, sin), k[..., rotary:]), dim=-1)
        weights = self.weights_proj(x).float() * (self.heads**-0.5 * self.width**-0.5)
        scores = torch.zeros(x.shape[0], x.shape[1], x.shape[1], device=x.device)
        for head in range(self.heads):
            scores = scores + weights[..., head, None] * F.relu(q[:, :, head] @ k.transpose(1, 2)).float()
        return scores


_FAST_TURN = 0.03
"""Radians a position from which on a rotary pair tells neighbours apart."""
_LOOK_BACK_STRENGTH = 3.0


class Attention(nn.Module):
    """Multi-head latent attention with the indexer beside it."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.topk, self.scale = c["num_attention_heads"], c["index_topk"], softmax_scale(c)
        self.nope, self.rope, self.v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        hidden, q_rank, kv_rank = c["hidden_size"], c["q_lora_rank"], c["kv_lora_rank"]
        self.kv_rank = kv_rank
        self.q_a_proj = linear(hidden, q_rank)
        self.q_a_layernorm = RMSNorm(q_rank)
        self.q_b_proj = linear(q_rank, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(hidden, kv_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(kv_rank)
        self.kv_b_proj = linear(kv_rank, self.heads * (self.nope + self.v))
        self.o_proj = linear(self.heads * self.v, hidden)
        nn.init.normal_(self.o_proj.weight, std=(self.heads * self.v * 2 * c["num_hidden_layers"]) ** -0.5)
        self.indexer = Indexer(c)

    @torch.no_grad()
    def look_back(self, shared: torch.Tensor, turns: torch.Tensor) -> None:
        """Begin with head ``h`` on the token ``h + 1`` before its own: what copying is learned from.

        Left to chance, this pattern takes a third of the training to appear.

        Args:
            shared: ``[hidden]``, a direction that half of every input's length lies in.
            turns: radians a position, of the rotary pairs.
        """
        length_in = (len(shared) / 2) ** 0.5
        direction = shared / shared.norm()
        fast = turns > _FAST_TURN
        key = torch.stack((fast.float(), torch.zeros(len(turns))), dim=-1).flatten() * _LOOK_BACK_STRENGTH
        self.kv_a_proj_with_mqa.weight[self.kv_rank :] += torch.outer(key, direction) / length_in
        constant = self.q_a_proj.weight @ direction
        constant = constant / constant.norm()
        rows = self.q_b_proj.weight.view(self.heads, self.nope + self.rope, -1)
        for head in range(self.heads):
            angles = -(head + 1) * turns.float()
            query = rotate_pairs(key, angles.cos(), angles.sin())
            rows[head, self.nope :] += torch.outer(query, constant) / (len(constant) / 2) ** 0.5

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: Mode
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[B, T, hidden]`` to the same, the indexer's loss and its recall."""
        length = x.shape[1]
        q_c = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_c).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv_c, k_pe = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope], dim=-1)
        k_nope, v = (
            self.kv_b_proj(self.kv_a_layernorm(kv_c))
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)
            .split([self.nope, self.v], dim=-1)
        )
        q_pe = rotate_pairs(q[..., self.nope :], cos.unsqueeze(1), sin.unsqueeze(1))
        k_pe = rotate_pairs(k_pe, cos, sin).unsqueeze(1).expand(-1, self.heads, -1, -1)
        q = torch.cat((q[..., : self.nope], q_pe), dim=-1)
        k = torch.cat((k_nope, k_pe), dim=-1)
        zero = x.new_zeros((), dtype=torch.float32)
        if mode is Mode.DENSE:
            # One kernel wants one width.
            wide_v = F.pad(v, (0, q.shape[-1] - self.v))
            out = F.scaled_dot_product_attention(q, k, wide_v, is_causal=True, scale=self.scale)[..., : self.v]
            return self.o_proj(out.transpose(1, 2).flatten(2)), zero, zero
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        index_scores = self.indexer(x, q_c, cos, sin).masked_fill(~causal, -torch.inf)
        threshold = index_scores.detach().topk(min(self.topk, length), dim=-1).values[..., -1:]
        selected = (index_scores.detach() >= threshold) & causal
        scores = (q @ k.transpose(2, 3)).float() * self.scale
        dense = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        with torch.no_grad():
            target = dense.mean(1)
            selects = torch.arange(length, device=x.device) >= self.topk
            recall = ((target * selected).sum(-1) * selects).mean() / selects.float().mean().clamp(min=1e-9)
        if mode is Mode.SPARSE:
            index_scores = index_scores.masked_fill(~selected, -torch.inf)
            target = target * selected
            target = target / target.sum(-1, keepdim=True)
            probabilities = scores.masked_fill(~selected.unsqueeze(1), -torch.inf).softmax(-1)
        else:
            probabilities = dense
        log_index = index_scores.log_softmax(-1).masked_fill(target == 0, 0.0)
        divergence = (target * (target.clamp(min=1e-9).log() - log_index)).sum(-1).mean()
        out = probabilities.to(v.dtype) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2)), divergence, recall


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)
        nn.init.normal_(self.down_proj.weight, std=(2 * width * num_layers) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Sigmoid scores; the bias decides which experts are chosen, not how much they count."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden) * hidden**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))


class MoE(nn.Module):
    """Grouped top-k routing, balanced without a loss: the bias moves against each expert's load."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c = c
        hidden, width, layers = c["hidden_size"], c["moe_intermediate_size"], c["num_hidden_layers"]
        self.gate = Gate(hidden, c["n_routed_experts"])
        # Of all experts together; the checkpoint has them one by one.
        experts = c["n_routed_experts"]
        self.gate_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.up_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * (2 * width * layers) ** -0.5)
        self.shared_experts = MLP(hidden, width * c["n_shared_experts"], layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, flat = self.c, x.flatten(0, 1)
        scores = F.linear(flat.float(), self.gate.weight.float()).sigmoid()
        biased = scores + self.gate.e_score_correction_bias
        groups = biased.unflatten(-1, (c["n_group"], -1))
        best_groups = groups.topk(2, dim=-1).values.sum(-1).topk(c["topk_group"], dim=-1).indices
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best_groups, True)
        biased = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
        chosen = biased.topk(c["num_experts_per_tok"], dim=-1).indices
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        weights = weights / weights.sum(-1, keepdim=True) * c["routed_scaling_factor"]
        if self.training:
            with torch.no_grad():
                load = (weights > 0).float().mean(0)
                self.gate.e_score_correction_bias += 1e-3 * (load.mean() - load).sign()
        # All experts on all tokens: at this size cheaper than sorting tokens.
        inner = F.silu(F.linear(flat, self.gate_proj.flatten(0, 1))) * F.linear(flat, self.up_proj.flatten(0, 1))
        weighted = inner.unflatten(-1, (c["n_routed_experts"], -1)) * weights.unsqueeze(-1).to(inner.dtype)
        out = weighted.flatten(1) @ self.down_proj.transpose(1, 2).flatten(0, 1).to(inner.dtype)
        return out.view_as(x) + self.shared_experts(x)


class DecoderLayer(nn.Module):
    """Attention and experts (or a dense MLP), each behind a norm."""

    def __init__(self, c: dict[str, Any], layer: int) -> None:
        super().__init__()
        hidden = c["hidden_size"]
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(hidden), RMSNorm(hidden)
        self.self_attn = Attention(c)
        is_dense = layer < c["first_k_dense_replace"]
        self.mlp = MLP(hidden, c["intermediate_size"], c["num_hidden_layers"]) if is_dense else MoE(c)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: Mode
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attended, divergence, recall = self.self_attn(self.input_layernorm(x), cos, sin, mode)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), divergence, recall


class Inner(nn.Module):
    """What the checkpoint calls ``model``."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        # A direction that all tokens share: without biases, attention by position alone needs one, and copying
        # begins with attention to the token before.
        scale = c["hidden_size"] ** -0.5
        shared = torch.randn(c["hidden_size"]) * scale
        with torch.no_grad():
            self.embed_tokens.weight.copy_(torch.randn(c["vocab_size"], c["hidden_size"]) * scale + shared)
        num_layers = c["num_hidden_layers"]
        self.layers = nn.ModuleList(DecoderLayer(c, layer) for layer in range(num_layers + 1))
        self.layers[0].self_attn.look_back(shared, frequencies(c))
        draft, hidden = self.layers[num_layers], c["hidden_size"]
        draft.enorm, draft.hnorm = RMSNorm(hidden), RMSNorm(hidden)
        draft.eh_proj = linear(2 * hidden, hidden)
        draft.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden)})
        self.norm = RMSNorm(hidden)


class SmallModel(nn.Module):
    """The whole model with its draft layer; embedding and head of the draft are the main model's."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Args: config: with the keys of the published config.json."""
        super().__init__()
        self.config = config
        self.register_buffer("turns", frequencies(config), persistent=False)
        self.model = Inner(config)
        self.lm_head = linear(config["hidden_size"], config["vocab_size"])

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, mode: Mode) -> tuple[torch.Tensor, Losses]:
        """Final hidden states ``[B, T, hidden]`` and the indexer's losses (the others are zero)."""
        c = self.config
        cos, sin = self._cos_sin(positions)
        x = self.model.embed_tokens(ids)
        divergences, recalls = [], []
        for layer in self.model.layers[: c["num_hidden_layers"]]:
            x, divergence, recall = layer(x, cos, sin, mode)
            divergences.append(divergence)
            recalls.append(recall)
        hidden = self.model.norm(x)
        zero = x.new_zeros((), dtype=torch.float32)
        return hidden, Losses(zero, zero, torch.stack(divergences).mean(), torch.stack(recalls).mean())

    def losses(self, ids: torch.Tensor, positions: torch.Tensor, spoken: torch.Tensor, mode: Mode) -> Losses:
        """All losses of a batch.

        Args:
            ids: ``[B, T]``.
            positions: ``[B, T]``, ascending, not necessarily without gaps.
            spoken: bool ``[B, T]``: the tokens that the assistant says, which is what is learned.
            mode: the stage.
        """
        hidden, losses = self(ids, positions, mode)
        targets = ids.masked_fill(~spoken, -100)
        losses.language = self._cross_entropy(hidden[:, :-1], targets[:, 1:])
        num_layers = self.config["num_hidden_layers"]
        layer = self.model.layers[num_layers]
        # The last token has none to join; what comes of it is not asked for.
        embedded = self.model.embed_tokens(ids.roll(-1, dims=1))
        joined = torch.cat((layer.enorm(embedded), layer.hnorm(hidden.detach())), dim=-1)
        drafted, divergence, _ = layer(layer.eh_proj(joined), *self._cos_sin(positions), mode)
        losses.draft = self._cross_entropy(layer.shared_head["norm"](drafted)[:, :-2], targets[:, 2:])
        losses.indexer = (losses.indexer * num_layers + divergence) / (num_layers + 1)
        return losses

    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, T]`` to two of float32 ``[B, T, qk_rope_head_dim / 2]``."""
        angles = positions.double().unsqueeze(-1) * self.turns
        return angles.cos().float(), angles.sin().float()

    def _cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.lm_head(hidden).float().flatten(0, 1), targets.flatten())
