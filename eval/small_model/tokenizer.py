"""A small byte-level BPE tokenizer with DeepSeek-V3.2's control tokens, trained on the tasks' own text."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vllm_dsv32.tools.tiny_tokenizer import ADDED_TOKENS, SPECIAL_TOKENS

__all__ = ["train_tokenizer"]

# Digits alone (numbers are added digit by digit), words with the space before them, everything else in runs.
_PIECES = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s")


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Learn merges.

    Args:
        texts: to learn from.
        size: of the vocabulary, control tokens included.

    Returns:
        A tokenizer that adds no token of its own; ids 0, 1 and 2 are begin, end and padding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [AddedToken(token, normalized=False, special=token in SPECIAL_TOKENS) for token in ADDED_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=controls,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer makes all of them special; decoding must keep those that parsers read.
    trained = json.loads(tokenizer.to_str())
    for token in trained["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS
    return Tokenizer.from_str(json.dumps(trained))
