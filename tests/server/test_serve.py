"""`vllm serve` with the plugin, as a client sees it. The weights are random: only forms are checked here."""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

import vllm_dsv32
from server.conftest import MAX_MODEL_LEN, MODEL, Server

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Berlin", "Paris"]},
                    "days": {"type": "integer", "enum": [1, 2, 3]},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "get_date", "strict": True, "parameters": {"type": "object", "properties": {}}},
    },
]
QUESTION = [{"role": "user", "content": "What is the weather in Berlin tomorrow?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: openai.OpenAI, **options):
    defaults = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    return client.chat.completions.create(**(defaults | options))


def streamed(chunks) -> tuple[str, str, dict[int, dict[str, str]], str | None]:
    """Reasoning, content, calls by index, and the finish reason of a stream."""
    reasoning, content, calls, finish = "", "", {}, None
    for chunk in chunks:
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                known = calls.setdefault(call.index, {"id": "", "name": "", "arguments": ""})
                known["id"] += call.id or ""
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""
    return reasoning, content, calls, finish


def test_health_and_models(server):
    assert server.get("/health")[0] == 200
    status, text = server.get("/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(text)["data"]] == [MODEL]


def test_the_log_says_once_that_the_plugin_serves_and_with_which_kernels(server):
    lines = [line for line in server.log.read_text().splitlines() if "vllm-dsv32 serves this model" in line]
    assert len(lines) == 1
    assert "sparse_mla=reference" in lines[0]
    assert "KV cache auto" in lines[0]


def test_a_chat_answer_whole_and_streamed(client):
    whole = ask(client).choices[0]
    assert whole.finish_reason == "length"
    assert whole.message.content
    assert not getattr(whole.message, "reasoning", None)
    reasoning, content, calls, finish = streamed(ask(client, stream=True))
    assert (reasoning, content, calls, finish) == ("", whole.message.content, {}, "length")


def test_thinking_whole_and_streamed(client):
    thinking = {"chat_template_kwargs": {"thinking": True}}
    whole = ask(client, extra_body=thinking).choices[0].message
    assert whole.reasoning
    assert not whole.content
    reasoning, content, calls, _ = streamed(ask(client, extra_body=thinking, stream=True))
    assert (reasoning, content, calls) == (whole.reasoning, "", {})


@pytest.fixture(scope="module")
def no_optional_whitespace(server: Server) -> dict:
    """Where the grammar leaves a choice, no whitespace: random weights would dwell on it to the end."""
    status, answer = server.post("/tokenize", {"model": MODEL, "prompt": " \t\r\n", "add_special_tokens": False})
    assert (status, len(answer["tokens"])) == (200, 4)
    return {"logit_bias": {str(token): -100 for token in answer["tokens"]}}


def test_a_forced_tool_call_whole_and_streamed(client, no_optional_whitespace):
    options = {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "max_tokens": 400,
        **no_optional_whitespace,
    }
    whole = ask(client, **options).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Berlin", "Paris")
    assert arguments["days"] in (1, 2, 3)
    _, content, calls, finish = streamed(ask(client, stream=True, **options))
    assert content == (whole.message.content or "")
    assert (calls[0]["name"], json.loads(calls[0]["arguments"])) == ("get_weather", arguments)
    assert calls[0]["id"]
    assert finish == whole.finish_reason


def test_required_and_none(client, no_optional_whitespace):
    options = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400}
    whole = ask(client, tools=TOOLS, **options, **no_optional_whitespace).choices[0]
    assert {call.function.name for call in whole.message.tool_calls} <= {"get_weather", "get_date"}
    assert whole.message.tool_calls
    assert not ask(client, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls


def test_a_tool_result_goes_back_into_the_prompt(client):
    history = [
        *QUESTION,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "get_date", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "2025-12-01"},
    ]
    assert ask(client, messages=history, tools=TOOLS).choices[0].message.content


def test_eight_requests_at_once_are_answered_as_alone(client):
    questions = [[{"role": "user", "content": f"Count to {n}: " + "1 2 3 " * (3 * n)}] for n in range(8)]
    alone = [ask(client, messages=question).choices[0].message.content for question in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda q: ask(client, messages=q).choices[0].message.content, questions))
    # Sums depend on the batch, so a nearly tied token may differ: of eight greedy answers, few do.
    assert all(together)
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 6


def test_an_overlong_prompt_is_refused(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "word " * MAX_MODEL_LEN}], "max_tokens": 4}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 400
    assert str(MAX_MODEL_LEN) in answer["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "wizard", "content": "Hello"}], "wizard"),
        ([*QUESTION, {"role": "tool", "tool_call_id": "nope", "content": "1"}], "messages[1]"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}],
                }
            ],
            "",
        ),
    ],
    ids=["unknown role", "result without a call", "image"],
)
def test_an_impossible_history_is_a_client_error(server, messages, words):
    status, answer = server.post("/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 4})
    assert status == 400
    assert words in answer["error"]["message"]


def test_every_process_resolves_our_names_and_uses_our_classes(server, client):
    ask(client)
    end = time.monotonic() + 120
    wanted = {
        "the API server": {
            "serving.tokenizer",
            "serving.renderer",
            "serving.tool_parser",
            "serving.reasoning_parser",
        },
        "the engine core": {"serving.tokenizer", "serving.reasoning_parser"},
        "the worker": {"model.deepseek_v32", "attention.sparse_attention"},
    }
    missing = set(wanted)
    while missing and time.monotonic() < end:
        time.sleep(0.5)
        notes = [json.loads(path.read_text()) for path in server.probe_folder.glob("*.json")]
        used = [{module.removeprefix("vllm_dsv32.") for module in note["modules"]} for note in notes]
        missing = {who for who, modules in wanted.items() if not any(modules <= have for have in used)}
    assert not missing
    assert len(notes) >= 2
    # The server has other processes too, which use nothing of ours.
    for note, have in zip(notes, used, strict=True):
        if any(modules <= have for modules in wanted.values()):
            for surface, owner in note["owners"].items():
                assert owner.startswith("vllm_dsv32.serving."), (note["process"], surface, owner)


def live_processes(group: int) -> list[str]:
    """The command lines of a process group. Who has ended and only waits to be collected is not in it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " "))
    return found


def test_sigterm_ends_every_process(server):
    """Ends the server of this file, which no other file uses: last, and pytest keeps the order of a file.

    A server of its own would take half a minute of two idle cores, and minutes of busy ones. What vLLM reports
    meanwhile depends on which process goes first; of the plugin's code, nothing may fail.
    """
    group, end = server.process.pid, time.monotonic() + 180
    assert len(live_processes(group)) > 1
    code = server.stop()
    assert code in (0, -15, 143), server.log.read_text()[-2000:]
    while (left := live_processes(group)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left
    package = Path(vllm_dsv32.__file__).parent
    assert f'File "{package}/' not in server.log.read_text()
