"""The two-question tool loop, thinking, over each of vLLM's chat APIs, down to the model's exact prompts."""

import json
import re

import pytest

from replay.checkpoint import seen_prompts
from server.replies import (
    BEIJING,
    FIRST_QUESTION,
    FIRST_REPLIES,
    HANGZHOU,
    SECOND_QUESTION,
    SECOND_REPLIES,
    TOOLS,
)
from server.tool_loops import ChatLoop, MessagesLoop, ResponsesLoop, SubTurn

END = "<｜end▁of▁sentence｜>"
DATE_RESULT = "\n\n<function_results>\n<result>2025-12-01</result>\n</function_results>"
WEATHER_RESULT = "\n\n<function_results>\n<result>Cloudy 7~13°C</result>\n</function_results>"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("loop_class", [ChatLoop, ResponsesLoop, MessagesLoop])
def test_tool_loop(replay_server, loop_class, stream):
    num_seen = len(seen_prompts(replay_server.checkpoint))
    loop = loop_class(replay_server, stream=stream)

    assert loop.ask(FIRST_QUESTION) == [
        SubTurn("I need to know today's date.", "", [("get_date", {})]),
        SubTurn("So tomorrow is 2025-12-02.", "Let me look.", [HANGZHOU]),
        SubTurn("Cloudy it is.", "Tomorrow will be cloudy in Hangzhou, 7~13°C."),
    ]
    assert loop.ask(SECOND_QUESTION) == [
        SubTurn("The date has not changed.", "", [BEIJING]),
        SubTurn("It is the same.", "Beijing will be cloudy, too."),
    ]

    prompts = seen_prompts(replay_server.checkpoint)[num_seen:]
    system, _, conversation = prompts[0].partition("<｜User｜>")
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in TOOLS)
    assert system.startswith("<｜begin▁of▁sentence｜>\n\n## Tools\n\n")
    assert system.endswith(f"<functions>\n{functions}\n</functions>\n")
    assert conversation == f"{FIRST_QUESTION}<｜Assistant｜><think>"
    assert len(prompts) == 5
    # Within a question, what the model said comes back to it to the letter, its thoughts included.
    assert prompts[1] == prompts[0] + FIRST_REPLIES[0] + END + DATE_RESULT + "\n\n<think>"
    assert prompts[2] == prompts[1] + FIRST_REPLIES[1] + END + WEATHER_RESULT + "\n\n<think>"
    # With the next question, the thoughts before it are gone.
    told = without_thoughts(conversation + prompts[2].removeprefix(prompts[0]) + FIRST_REPLIES[2])
    assert prompts[3] == f"{system}<｜User｜>{told}{END}<｜User｜>{SECOND_QUESTION}<｜Assistant｜><think>"
    assert prompts[4] == prompts[3] + SECOND_REPLIES[0] + END + WEATHER_RESULT + "\n\n<think>"


def without_thoughts(conversation: str) -> str:
    return re.sub("<think>[^<]*</think>", "</think>", conversation)
