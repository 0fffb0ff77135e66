"""transformers' DeepseekV32ForCausalLM in float32, given the quantisation of the deployed model.

The quantisation is written anew here, in float64 and by its definition, so that an error in the plugin's
own quantisation shows as a difference.
"""

from pathlib import Path

import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

_E4M3_MAX = 448.0


def _round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest value of the format (4 exponent bits, 3 of mantissa), ties to even; |x| <= 448."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-20))).clamp(min=-6)
    step = torch.pow(torch.tensor(2.0, dtype=x.dtype), exponent - 3)
    return torch.round(x / step) * step


def fake_quantise(x: torch.Tensor, group_size: int, power_of_two: bool) -> torch.Tensor:
    """x, quantised to e4m3 in groups along its last dimension and back."""
    groups = x.double().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / _E4M3_MAX
    if power_of_two:
        scale = torch.pow(torch.tensor(2.0, dtype=torch.float64), torch.ceil(torch.log2(scale)))
    return (_round_to_e4m3((groups / scale).clamp(-_E4M3_MAX, _E4M3_MAX)) * scale).flatten(-2).to(x.dtype)


class _QuantisedIndexer(hf.DeepseekV32Indexer):
    """The indexer with fp8 queries and keys, one power-of-two scale a row of 128."""

    def forward(self, hidden_states, q_resid, position_embeddings, attention_mask, *_, past_key_values=None):
        batch, length, _ = hidden_states.shape
        cos, sin = position_embeddings
        q = self.wq_b(q_resid).view(batch, length, self.n_heads, self.head_dim)
        k = self.k_norm(self.wk(hidden_states)).unsqueeze(2)
        rotary = self.qk_rope_head_dim
        q_rot, k_rot = hf.apply_rotary_pos_emb(q[..., :rotary], k[..., :rotary], cos, sin, unsqueeze_dim=2)
        q = fake_quantise(torch.cat([q_rot, q[..., rotary:]], dim=-1), self.head_dim, power_of_two=True)
        k = fake_quantise(torch.cat([k_rot, k[..., rotary:]], dim=-1), self.head_dim, power_of_two=True)
        scores = torch.relu(torch.einsum("bshd,btd->bsht", q, k.squeeze(2)) * self.softmax_scale)
        weights = self.weights_proj(hidden_states) * self.n_heads**-0.5
        total = torch.einsum("bsh,bsht->bst", weights, scores)
        if attention_mask.dtype == torch.bool:
            total = total.masked_fill(~attention_mask, float("-inf"))
        else:
            total = total + attention_mask
        return total.topk(min(self.index_topk, total.shape[-1]), dim=-1).indices.int()


class _QuantisedLatentAttention(hf.DeepseekV32Attention):
    """Attention over an fp8_ds_mla cache: the latent in groups of 128, the rotary part in bfloat16."""

    def expand_kv(self, kv_nope, k_rot):
        return super().expand_kv(fake_quantise(kv_nope, 128, power_of_two=False), k_rot.bfloat16().to(k_rot.dtype))


def load_oracle(path: Path, *, fp8_index: bool = True, fp8_latent: bool = False):
    """The checkpoint at ``path`` as a float32 model whose index (and latent) is quantised as deployed."""
    # By class, not through Auto*: once vLLM is imported, it maps this model type to V3's configuration.
    config = DeepseekV32Config.from_pretrained(path)
    model = DeepseekV32ForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for layer in model.model.layers:
        # The classes add no state, so changing the class keeps the loaded weights.
        if fp8_index:
            layer.self_attn.indexer.__class__ = _QuantisedIndexer
        if fp8_latent:
            layer.self_attn.__class__ = _QuantisedLatentAttention
    return model


@torch.no_grad()
def oracle_logits(model, token_ids: list[int]) -> torch.Tensor:
    """Float32 ``[T, vocabulary]``, the whole sequence at once."""
    return model(torch.tensor([token_ids])).logits[0].float()
