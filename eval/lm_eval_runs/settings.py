"""The published runs: their settings, their figures, and the pass marks that follow from these.

The source is vLLM's usage guide for DeepSeek-V3.2. What it does not set is lm_eval's default, there and here: GSM8K
is greedy and ends after 256 tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

__all__ = [
    "AIME25",
    "GSM8K",
    "GSM8K_20_SHOT",
    "HELD_TO_ANOTHER",
    "MARK_RULE",
    "Settings",
    "gsm8k",
    "pass_mark",
    "standard_error",
]


@dataclass(frozen=True)
class Settings:
    """What lm_eval is told; the server and the data come on top."""

    task: str
    num_fewshot: int | None
    """None: the task's own."""
    num_concurrent: int
    max_length: int
    is_chat: bool = False
    timeout_s: int | None = None
    """None: lm_eval's own."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """What replaces the task's own generation parameters."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Figures by the filter of lm_eval that extracts the answer; empty if there are none for these settings."""
    held_to: Mapping[str, float] = field(default_factory=dict)
    """The figures that pass marks are made of; empty if there is nothing to hold the run to."""


_GSM8K_FIGURES: Final = {"flexible-extract": 0.9560, "strict-match": 0.9553}

GSM8K: Final = Settings(
    "gsm8k",
    num_fewshot=5,
    num_concurrent=32,
    max_length=8192,
    published=_GSM8K_FIGURES,
    held_to=_GSM8K_FIGURES,
)
GSM8K_20_SHOT: Final = replace(GSM8K, num_fewshot=20, published={})
"""Prompts longer than the 2,048 tokens that sparse attention selects, which 5-shot ones are not."""

AIME25: Final = Settings(
    "aime25",
    num_fewshot=None,
    num_concurrent=20,
    max_length=72_768,
    is_chat=True,
    timeout_s=5000,
    generation={
        "temperature": 1.0,
        "max_gen_toks": 72_768,
        "top_p": 0.95,
        "chat_template_kwargs": {"thinking": True},
    },
    published={"none": 0.9333},
    held_to={"none": 0.9333},
)


def gsm8k(num_fewshot: int, *, is_chat: bool) -> Settings:
    """GSM8K with other numbers of examples, or as a conversation: no published figure, nothing to be held to."""
    known = {settings.num_fewshot: settings for settings in (GSM8K, GSM8K_20_SHOT)}
    if num_fewshot in known and not is_chat:
        return known[num_fewshot]
    return replace(GSM8K, num_fewshot=num_fewshot, is_chat=is_chat, published={}, held_to={})


_NUM_ERRORS: Final = 2
MARK_RULE: Final = (
    f"Pass mark: the published figure p less {_NUM_ERRORS} standard errors, each sqrt(p (1 - p) / (n - 1)) for the "
    "n problems of this run. An equally good model misses it about once in 40 runs if each run drew its problems "
    "anew, and less often on the same problems."
)

HELD_TO_ANOTHER: Final = (
    "These settings have no published figure: that they reach the mark of the run with 5 examples is a goal."
)


def standard_error(figure: float, num_problems: int) -> float:
    """Of a share of right answers, as lm_eval computes it.

    Args:
        figure: the share.
        num_problems: at least 2.
    """
    return math.sqrt(figure * (1 - figure) / (num_problems - 1))


def pass_mark(figure: float, num_problems: int) -> float | None:
    """What a run must reach by :data:`MARK_RULE`; None for a single problem, which shows nothing."""
    if num_problems < 2:
        return None
    return figure - _NUM_ERRORS * standard_error(figure, num_problems)
