"""The client recipes, run as they stand against a server that replays replies."""

import asyncio
import importlib.util
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from replay.checkpoint import seen_prompts
from server.process import MODEL, Server
from server.replies import CLIENT_QUESTION, CLIENT_REPLY

RECIPES = Path(__file__).parents[2] / "recipes"
BLOCKS = re.findall(
    r"^```(bash|python)\n(.*?)^```$", (RECIPES / "clients.md").read_text(), re.DOTALL | re.MULTILINE
)


def run(command: list[str]) -> str:
    """The output of a command in the repository's root, whose python is this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=RECIPES.parent,
        env=os.environ | {"PATH": path, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def block(marker: str) -> tuple[str, str]:
    """Language and code of the one block of clients.md that holds `marker`."""
    (found,) = [found for found in BLOCKS if marker in found[1]]
    return found


def run_block(server: Server, marker: str) -> str:
    """The output of that block, for this server."""
    language, code = block(marker)
    code = code.replace("http://127.0.0.1:8000", server.url).replace("deepseek-ai/DeepSeek-V3.2", MODEL)
    return run(["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code])


def test_health_and_models(replay_server: Server):
    healthy, models = run_block(replay_server, "/health").splitlines()
    assert healthy == "healthy"
    assert [model["id"] for model in json.loads(models)["data"]] == [MODEL]


def test_chat_streamed(replay_server: Server):
    assert run_block(replay_server, "stream=True") == "0.11 is less than 0.9.9.9 is larger.\n"


def chunk(*choices: dict) -> ChatCompletionChunk:
    head = {"id": "1", "created": 1, "model": MODEL, "object": "chat.completion.chunk"}
    return ChatCompletionChunk.model_validate(head | {"choices": list(choices)})


def test_chat_streamed_with_the_last_thought_and_the_first_word_in_one_chunk(monkeypatch, capsys):
    """As a server sends them that falls behind: several tokens become one chunk. The last one holds the usage."""
    deltas = ({"reasoning": "0.11 is"}, {"reasoning": " less.", "content": "9.9 is"}, {"content": " larger."})
    chunks = [*(chunk({"index": 0, "delta": delta, "finish_reason": None}) for delta in deltas), chunk()]
    monkeypatch.setattr(openai.resources.chat.Completions, "create", lambda *_, **__: chunks)
    exec(block("stream=True")[1], {})
    assert capsys.readouterr().out == "0.11 is less.9.9 is larger.\n"


def test_chat_by_curl(replay_server: Server):
    (choice,) = json.loads(run_block(replay_server, "-d '{"))["choices"]
    assert choice["message"]["reasoning"] == "0.11 is less than 0.9."
    assert choice["message"]["content"] == "9.9 is larger."


def test_every_block_was_run():
    markers = ("/health", "stream=True", "-d '{", "tool_loop.py")
    assert [sum(marker in code for marker in markers) for _, code in BLOCKS] == [1] * len(markers)


def test_tool_loop(replay_server: Server):
    num_seen = len(seen_prompts(replay_server.checkpoint))
    assert run_block(replay_server, "tool_loop.py").splitlines() == [
        "Question 1: How is the weather in Hangzhou tomorrow?",
        "",
        "Turn 1.1",
        "  reasoning: I need to know today's date.",
        "  content: None",
        "  get_date {} -> 2025-12-01",
        "",
        "Turn 1.2",
        "  reasoning: So tomorrow is 2025-12-02.",
        "  content: Let me look.",
        '  get_weather {"location": "Hangzhou", "date": "2025-12-02"} -> Hangzhou, 2025-12-02: cloudy, 7~13°C',
        "",
        "Turn 1.3",
        "  reasoning: Cloudy it is.",
        "  content: Tomorrow will be cloudy in Hangzhou, 7~13°C.",
        "",
        "Question 2: And in Beijing?",
        "",
        "Turn 2.1",
        "  reasoning: The date has not changed.",
        "  content: None",
        '  get_weather {"location": "Beijing", "date": "2025-12-02"} -> Beijing, 2025-12-02: cloudy, 7~13°C',
        "",
        "Turn 2.2",
        "  reasoning: It is the same.",
        "  content: Beijing will be cloudy, too.",
        "",
    ]
    prompts = seen_prompts(replay_server.checkpoint)[num_seen:]
    assert "<think>So tomorrow is 2025-12-02.</think>Let me look." in prompts[2]
    assert "</think>Let me look." in prompts[3]
    assert "So tomorrow" not in prompts[3]


def completion(finish_reason: str, **message) -> ChatCompletion:
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", **message}}
    head = {"id": "1", "created": 1, "model": MODEL, "object": "chat.completion"}
    return ChatCompletion.model_validate(head | {"choices": [choice]})


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (completion("length", content="Tomorrow will"), "a reply was cut: raise --max-tokens"),
        (completion("stop", content=None, reasoning="Hm."), "a reply has neither content nor calls"),
    ],
    ids=["cut", "empty"],
)
def test_tool_loop_takes_no_unfinished_reply_for_an_answer(monkeypatch, reply, message):
    monkeypatch.setattr(openai.resources.chat.Completions, "create", lambda *_, **__: reply)
    monkeypatch.setattr(sys, "argv", ["tool_loop.py", "--model", MODEL])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(RECIPES / "tool_loop.py"), run_name="__main__")


@pytest.mark.parametrize(("variables", "key"), [({}, "none"), ({"OPENAI_API_KEY": "k"}, "k")], ids=["none", "one"])
def test_tool_loop_reads_its_key(monkeypatch, variables, key):
    seen = []

    def create(completions: openai.resources.chat.Completions, **_: object) -> ChatCompletion:
        seen.append(completions._client.api_key)
        return completion("stop", content="Cloudy.")

    monkeypatch.setattr(openai.resources.chat.Completions, "create", create)
    monkeypatch.setattr(sys, "argv", ["tool_loop.py", "--model", MODEL])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(RECIPES / "tool_loop.py"), run_name="__main__")
    assert seen == [key, key]  # of two questions


@pytest.mark.parametrize(
    ("path", "options", "thinks"),
    [
        ("chat/completions", {}, False),
        ("chat/completions", {"chat_template_kwargs": {"enable_thinking": True}}, True),
        ("chat/completions", {"reasoning_effort": "high"}, True),
        ("chat/completions", {"reasoning_effort": "none"}, False),
        ("responses", {}, False),
        ("responses", {"chat_template_kwargs": {"thinking": True}}, True),
        ("responses", {"reasoning": {"effort": "high"}}, True),
        ("responses", {"reasoning": {"effort": "none"}}, False),
        ("messages", {}, False),
        ("messages", {"chat_template_kwargs": {"thinking": True}}, True),
        ("messages", {"output_config": {"effort": "high"}}, True),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, False),
    ],
    ids=str,
)
def test_how_each_api_asks_for_thinking(replay_server: Server, path, options, thinks):
    message = {"role": "user", "content": CLIENT_QUESTION}
    body = {"model": MODEL, "input" if path == "responses" else "messages": [message]}
    if path == "messages":
        body["max_tokens"] = 2000
    status, answer = replay_server.post(f"/v1/{path}", body | options)
    assert status == 200
    told = seen_prompts(replay_server.checkpoint)[-1]
    assert told.endswith("<think>" if thinks else "</think>")
    # If the parser disagreed, the whole reply would be text.
    assert (CLIENT_REPLY in str(answer)) == (not thinks)


class TestOpenWebUiFilter:
    """Called as Open WebUI does: by keyword, with those of its extra arguments that the signature names."""

    @pytest.fixture
    def filter_(self):
        spec = importlib.util.spec_from_file_location("filter", RECIPES / "open_webui_thinking_filter.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Filter()

    def call(self, handler, body):
        extra = {
            "__user__": {"id": "1", "role": "user"},
            "__id__": "thinking",
            "__metadata__": {},
            "__event_emitter__": None,
        }
        named = {name: extra[name] for name in extra if name in inspect.signature(handler).parameters}
        result = handler(body=body, **named)
        return asyncio.run(result) if inspect.iscoroutinefunction(handler) else result

    def test_it_has_a_switch_in_the_chat(self, filter_):
        assert filter_.toggle is True

    def test_inlet_asks_for_thinking(self, filter_):
        body = {"model": "deepseek-v3.2", "messages": [], "stream": True}
        assert self.call(filter_.inlet, dict(body)) == body | {"chat_template_kwargs": {"thinking": True}}

    def test_inlet_leaves_a_request_that_says_itself(self, filter_):
        body = {
            "model": "deepseek-v3.2",
            "chat_template_kwargs": {"thinking": False, "add_generation_prompt": True},
        }
        assert self.call(filter_.inlet, dict(body)) == body

    @pytest.mark.parametrize(("models", "applies"), [("", True), ("llama, DeepSeek", True), ("llama,", False)])
    def test_the_administrators_choice_of_models(self, filter_, models, applies):
        filter_.valves = filter_.Valves(**{"models": models, "priority": 1})
        body = self.call(filter_.inlet, {"model": "hub.deepseek-v3.2"})
        assert ("chat_template_kwargs" in body) == applies

    def test_models_of_others_are_left_alone_by_default(self, filter_):
        assert self.call(filter_.inlet, {"model": "gpt-5"}) == {"model": "gpt-5"}
        assert self.call(filter_.inlet, {"model": "deepseek-ai/DeepSeek-V3.2"}).keys() > {"model"}

    def test_outlet_changes_nothing(self, filter_):
        body = {"messages": [{"role": "assistant", "content": "9.9"}]}
        assert self.call(filter_.outlet, dict(body)) == body

    def test_a_server_takes_what_the_inlet_makes(self, filter_, replay_server: Server):
        messages = [{"role": "user", "content": CLIENT_QUESTION}]
        body = self.call(filter_.inlet, {"model": MODEL, "messages": messages})
        status, answer = replay_server.post("/v1/chat/completions", body)
        assert status == 200
        assert answer["choices"][0]["message"]["reasoning"] == "0.11 is less than 0.9."
