"""A model that replays written replies, through everything else of a real engine.

It stands in for DeepSeek-V3.2 by `--model-class-overrides`; scheduler, paged cache, sampler, grammar, speculation,
detokenizer and parsers are vLLM's and the plugin's. Its folder holds, beside config.json and the tokenizer:

    replies.json    {question: [reply, ...]}: what to say to a user's message, at first and after each round of
                    tool results
    prompts.jsonl   written by the model: each prompt it was to answer, as text

A token's reply follows from the sequence before it alone, which the model reads back from a paged cache of token
ids. So batches, chunked prefill, drafts and their rejection are the engine's business, as with any model.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.functional import one_hot
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec

# No step samples more tokens of one request: one, and its drafts.
MAX_SAMPLED = 16
# The sampler's probability of any other token is exp(-100). A grammar's -inf still forbids.
CERTAIN = 100.0


class ReplayModel(torch.nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        self.script = Script(Path(vllm_config.model_config.model))
        self.history = TokenCache("layers.0.history")

    def embed_input_ids(self, input_ids):
        return torch.zeros(len(input_ids), 1)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """The next token of each position, float32 `[T, 1]`, where it may be sampled."""
        next_ids = torch.zeros(len(input_ids), 1)
        for rows, ids in self.history.append(input_ids):
            for back in range(min(len(rows), MAX_SAMPLED)):
                next_ids[rows[-1 - back]] = self.script.next_id(ids[: len(ids) - back])
        return next_ids

    def compute_logits(self, hidden_states):
        return CERTAIN * one_hot(hidden_states[:, 0].long(), self.vocab_size).float()

    def load_weights(self, weights: Iterable) -> set[str]:
        return set()


class Script:
    """The replies, and where in one of them a sequence of tokens stands."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        replies: Mapping[str, list[str]] = json.loads((folder / "replies.json").read_text())
        self.replies = {
            question: [self.tokenizer.encode(reply, add_special_tokens=False).ids for reply in rounds]
            for question, rounds in replies.items()
        }
        self.prompts = folder / "prompts.jsonl"
        self.eos, self.user, self.assistant = map(
            self.tokenizer.token_to_id, ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
        )
        self.think_tokens = {self.tokenizer.token_to_id(token) for token in ("<think>", "</think>")}

    def next_id(self, ids: Sequence[int]) -> int:
        """What follows `ids`: the next token of the reply to the last user's message, or the end."""
        question = last_index(ids, {self.user})
        end = max(question, last_index(ids, {self.eos}))
        # An opener ends in a think token; the reply starts after the first one since somebody else spoke.
        start = next((i + 1 for i in range(end + 1, len(ids)) if ids[i] in self.think_tokens), None)
        if question < 0 or start is None:
            return self.eos
        if start == len(ids):
            self.note_prompt(ids)
        text = self.text(ids[question + 1 : ids.index(self.assistant, question)])
        num_rounds = ids[question:].count(self.eos)
        rounds = self.replies.get(text, [])
        reply = rounds[num_rounds] if num_rounds < len(rounds) else self.no_reply(text, num_rounds)
        done = len(ids) - start
        return reply[done] if done < len(reply) else self.eos

    def no_reply(self, question: str, num_rounds: int) -> list[int]:
        text = f"replies.json has no reply {num_rounds} to {question!r}"
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def note_prompt(self, ids: Sequence[int]) -> None:
        with self.prompts.open("a") as file:
            file.write(json.dumps(self.text(ids)) + "\n")

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def last_index(ids: Sequence[int], wanted: set[int]) -> int:
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in wanted), -1)


class TokenCache(torch.nn.Module, AttentionLayerBase):
    """The token ids of every request, in a paged cache as keys and values are."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        get_current_vllm_config().compilation_config.static_forward_context[name] = self

    def append(self, input_ids) -> list[tuple[range, list[int]]]:
        """Store this step's tokens; return, for each request, their rows and the whole sequence up to them."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a dummy run
            return []
        batch: CommonAttentionMetadata = metadata[self.name]
        pages = self.kv_cache[:, 0, :, 0]
        size = pages.shape[1]
        slots = batch.slot_mapping[: batch.num_actual_tokens].long()
        pages[slots // size, slots % size] = input_ids[: len(slots)].to(pages.dtype)
        starts, lengths = batch.query_start_loc_cpu.tolist(), batch.seq_lens.tolist()
        return [
            (range(starts[i], starts[i + 1]), self.read(batch.block_table_tensor[i], lengths[i]))
            for i in range(batch.num_reqs)
            if starts[i + 1] > starts[i]
        ]

    def read(self, blocks, length: int) -> list[int]:
        pages = self.kv_cache[:, 0, :, 0]
        num_blocks = -(-length // pages.shape[1])
        return pages[blocks[:num_blocks].long()].flatten()[:length].tolist()

    def get_attn_backend(self):
        return TokenCacheBackend

    def get_kv_cache_spec(self, vllm_config):
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=1, dtype=torch.int32
        )


class TokenCacheBackend(AttentionBackend):
    @staticmethod
    def get_name():
        return "TOKEN_CACHE"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("the model reads the cache itself")

    @staticmethod
    def get_builder_cls():
        return BatchAsItIs

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(16)]

    @classmethod
    def is_mla(cls):
        return True

    @classmethod
    def is_sparse(cls):
        return True


class BatchAsItIs(AttentionMetadataBuilder):
    """The engine's own description of the batch says enough."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return common_attn_metadata
