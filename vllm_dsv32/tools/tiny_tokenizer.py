"""A byte-level tokenizer with DeepSeek-V3.2's control tokens.

It needs no download and no training: one token per byte, no merges, so every text round-trips and its length
in tokens is its length in UTF-8 bytes. The control tokens are the real ones, in the real order and with the
real distinction between *special* tokens, which decoding drops under ``skip_special_tokens``, and plain added
tokens, which it keeps. Only the ids differ, except for 0, 1 and 2.
"""

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

__all__ = [
    "ADDED_TOKENS",
    "BOS_TOKEN",
    "EOS_TOKEN",
    "PAD_TOKEN",
    "SPECIAL_TOKENS",
    "make_tokenizer",
    "tokenizer_size",
    "write_tokenizer",
    "write_tokenizer_config",
]

BOS_TOKEN: Final = "<｜begin▁of▁sentence｜>"
EOS_TOKEN: Final = "<｜end▁of▁sentence｜>"
PAD_TOKEN: Final = "<｜▁pad▁｜>"

LEADING_TOKENS: Final = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)
"""Ids 0, 1 and 2, as in the real tokenizer."""

TRAILING_TOKENS: Final = (
    "｜DSML｜",
    "<｜search▁begin｜>",
    "<｜search▁end｜>",
    "<think>",
    "</think>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
"""The last ids, in the real order."""

# The real tokenizer reserves tokens of this name between the text tokens and the control tokens. Here they
# fill the vocabulary up to a multiple of 64, so that every id that a random model samples has a token.
_SIZE: Final = 320
PLACEHOLDER_TOKENS: Final = tuple(
    f"<｜place▁holder▁no▁{index}｜>" for index in range(_SIZE - 256 - len(LEADING_TOKENS) - len(TRAILING_TOKENS))
)

ADDED_TOKENS: Final = LEADING_TOKENS + PLACEHOLDER_TOKENS + TRAILING_TOKENS
SPECIAL_TOKENS: Final = frozenset({*LEADING_TOKENS, *PLACEHOLDER_TOKENS, "<|EOT|>"})
"""The added tokens that are also special; all others survive ``skip_special_tokens=True``."""


def tokenizer_size() -> int:
    """Return the number of tokens, which is one past the highest id."""
    return _SIZE


def make_tokenizer() -> Tokenizer:
    """Build the tokenizer.

    Returns:
        A ``tokenizers.Tokenizer``: ids 0 to 2 are begin, end and padding, 3 to 258 the bytes, the rest the
        other added tokens. Encoding adds no token of its own, as the real one does not.
    """
    # BPE without merges: every byte, spelled in the byte-level alphabet, is a token of its own.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*LEADING_TOKENS, *alphabet, *PLACEHOLDER_TOKENS, *TRAILING_TOKENS)
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=token in SPECIAL_TOKENS) for token in ADDED_TOKENS]
    )
    return tokenizer


def write_tokenizer(path: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into the existing folder ``path``."""
    make_tokenizer().save(str(path / "tokenizer.json"))
    write_tokenizer_config(path)


def write_tokenizer_config(path: Path) -> None:
    """Write the ``tokenizer_config.json`` that goes with any tokenizer of these control tokens."""
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS_TOKEN,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "model_max_length": 131072,
        # As in the real file, padding is the end token and not <｜▁pad▁｜>.
        "pad_token": EOS_TOKEN,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (path / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
