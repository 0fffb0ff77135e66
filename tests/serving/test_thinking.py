import logging

import pytest

from vllm_dsv32.serving import thinking
from vllm_dsv32.serving.thinking import wants_thinking, warn_unknown_keys


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (None, False),
        ({}, False),
        ({"thinking": True}, True),
        ({"thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "None"}, False),
        ({"reasoning_effort": None, "thinking": None, "enable_thinking": None}, False),
        ({"thinking": None, "enable_thinking": True}, True),
        # The server's defaults switch thinking on, the request switches it off: in each key, by each key.
        ({"thinking": True, "enable_thinking": False}, False),
        ({"enable_thinking": True, "thinking": False}, False),
        ({"thinking": True, "reasoning_effort": "none"}, False),
        # What vLLM makes of `reasoning_effort` in a request.
        ({"thinking": True, "reasoning_effort": "none", "enable_thinking": False}, False),
        ({"reasoning_effort": "high", "enable_thinking": True}, True),
        ({"thinking": False, "reasoning_effort": "high", "enable_thinking": True}, False),
        # Values as clients write them.
        ({"thinking": "true"}, True),
        ({"thinking": "False"}, False),
        ({"thinking": 1}, True),
        ({"thinking": 0}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
    ],
)
def test_decision(kwargs, expected):
    assert wants_thinking(kwargs) is expected


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, thinking.logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


def test_one_warning_for_each_unknown_key(warnings):
    for _ in range(3):
        warn_unknown_keys(["thinking", "think_hard", "tokenize", "budget"])
    assert [message.split(",")[0] for message in warnings()] == [
        "chat_template_kwargs: DeepSeek-V3.2 does not read 'think_hard'",
        "chat_template_kwargs: DeepSeek-V3.2 does not read 'budget'",
    ]
    assert "It reads thinking, enable_thinking, reasoning_effort." in warnings()[0]


def test_no_warning_for_what_vllm_passes_along(warnings, tokenizer):
    tokenizer.apply_chat_template(
        [{"role": "user", "content": "u"}],
        tools=None,
        thinking=True,
        reasoning_effort=None,
        add_generation_prompt=True,
        continue_final_message=False,
        chat_template=None,
        documents=None,
        cohere_format="cmd4",
        return_dict=False,
        tokenize=False,
    )
    assert warnings() == []


def test_the_tokenizer_warns(warnings, tokenizer):
    tokenizer.apply_chat_template([{"role": "user", "content": "u"}], documents=[1], tokenize=False)
    assert len(warnings()) == 1
