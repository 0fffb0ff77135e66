"""Where this plugin's text side and vLLM's own differ, why, and which of them is right.

    python eval/text_differences.py                   prints the report; under a minute
    python eval/text_differences.py --json diff.json  writes it too, with every differing input
    python eval/text_differences.py --every 10        one input in ten: to see that it runs

Both sides get the same chat histories and the same replies of the model, and both are held against expected
values: DeepSeek's own test case, and the hand-written ones of `text_cases`, which tests/serving checks too.

A reason is what was observed. For a prompt it is an edit: made to the right prompt, it gives vLLM's, character
for character. For a reply it is what the client gets wrong. An input can have several reasons.
The inputs are corner cases, not a sample: the counts say what goes wrong, not how often in use.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

import prompt_edits
from text_cases.histories import HISTORIES, History
from text_cases.refusals import REFUSALS
from text_cases.replies import REPLIES, Reply
from text_sides import Answer, Side, chat_request, cut, environment, open_sides

GOLDEN = Path(__file__).parents[1] / "tests" / "serving" / "golden"
TOKENS_PER_DELTA = (1, 2, 5, 1 << 20)
# Characters of an example's values that the text report shows.
SHOWN = 160


@dataclass
class Difference:
    """One input for which vLLM's side is not as expected."""

    name: str
    reasons: list[str]
    expected: Any
    in_tree: Any


@dataclass
class Section:
    """What came of one kind of input."""

    num_inputs: int
    plugin_as_expected: int
    differences: list[Difference]

    def summary(self) -> dict[str, Any]:
        """For the report: the differing inputs by reason, the most frequent first."""
        groups: dict[str, list[Difference]] = {}
        for difference in self.differences:
            for reason in difference.reasons:
                groups.setdefault(reason, []).append(difference)
        ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
        return {
            "inputs": self.num_inputs,
            "plugin_as_expected": self.plugin_as_expected,
            "in_tree_as_expected": self.num_inputs - len(self.differences),
            "reasons": [
                {
                    "reason": reason,
                    "inputs": [member.name for member in members],
                    "example": asdict(min(members, key=_size)),
                }
                for reason, members in ordered
            ],
            "differences": [asdict(difference) for difference in self.differences],
        }


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--every", type=int, default=1, help="take one input in so many")
    options = parser.parse_args()
    step = options.every
    with open_sides() as sides:
        report = {
            **environment(),
            "histories": compare_histories(sides, [*golden(), *HISTORIES][::step]).summary(),
            "refusals": compare_refusals(sides, list(REFUSALS)[::step]).summary(),
            "replies": compare_replies(sides, REPLIES[::step]).summary(),
        }
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Histories that have a prompt.


def golden() -> list[History]:
    """DeepSeek's test case: as it is, with the tools in the request, and with vLLM's key for reasoning."""
    case = json.loads((GOLDEN / "test_input.json").read_text(encoding="utf-8"))
    prompt = (GOLDEN / "test_output.txt").read_text(encoding="utf-8").strip()
    messages, tools = case["messages"], case["tools"]
    renamed = prompt_edits.with_vllm_key(messages)
    as_it_is = [{**messages[0], "tools": tools}, *messages[1:]]
    return [
        History("DeepSeek's test case", as_it_is, prompt, {"thinking": True}),
        History("DeepSeek's test case, tools of the request", messages, prompt, {"thinking": True, "tools": tools}),
        History("DeepSeek's test case, vLLM's key", renamed, prompt, {"thinking": True, "tools": tools}),
    ]


def compare_histories(sides: tuple[Side, Side], histories: Sequence[History]) -> Section:
    """Prompts against the expected ones."""
    plugin, in_tree = sides
    section = Section(len(histories), 0, [])
    for history in histories:
        section.plugin_as_expected += prompt_or_error(plugin, history.messages, history.options) == history.prompt
        theirs = prompt_or_error(in_tree, history.messages, history.options)
        if theirs != history.prompt:
            reasons = why_prompt_differs(in_tree, history, theirs)
            section.differences.append(Difference(history.name, reasons, history.prompt, theirs))
    return section


def why_prompt_differs(in_tree: Side, history: History, theirs: str | dict[str, Any]) -> list[str]:
    """The reasons for vLLM's prompt, or for its refusal."""
    if isinstance(theirs, str):
        return prompt_edits.explain(history, theirs) or ["not explained"]
    renamed = prompt_edits.with_vllm_key(history.messages)
    if renamed != history.messages:
        prompt = prompt_or_error(in_tree, renamed, history.options)
        if isinstance(prompt, str) and (others := prompt_edits.explain(history, prompt)) is not None:
            return ["refused: DeepSeek's key reasoning_content is not read", *others]
    return [f"refused: {theirs['message'].partition('`')[0].strip()}"]


def prompt_or_error(side: Side, messages: Sequence[Any], options: dict[str, Any]) -> str | dict[str, Any]:
    """The prompt, or the HTTP status and message with which vLLM's server answers in its place."""
    # A copy, as vLLM's renderer writes into the messages.
    messages, options = json.loads(json.dumps([messages, options]))
    try:
        return side.render(messages, options)
    except Exception as error:  # whatever it is, the server turns it into a response
        response = create_error_response(error).error
        return {"status": int(response.code), "message": response.message}


# Histories that have none.


def compare_refusals(sides: tuple[Side, Side], names: Sequence[str]) -> Section:
    """Refusals: the expected one is HTTP 400 with the given reason."""
    plugin, in_tree = sides
    section = Section(len(names), 0, [])
    for name in names:
        messages, options, reason = REFUSALS[name]
        ours = prompt_or_error(plugin, messages, options)
        section.plugin_as_expected += isinstance(ours, dict) and ours["status"] == 400 and reason in ours["message"]
        theirs = prompt_or_error(in_tree, messages, options)
        if isinstance(theirs, str):
            found = "rendered, as if nothing were wrong"
        elif theirs["status"] != 400:
            found = f"HTTP {theirs['status']}: the client is told that the server failed"
        elif "messages[" in reason and "messages[" not in theirs["message"]:
            found = "HTTP 400, but the message at fault is not named"
        else:
            continue
        section.differences.append(
            Difference(name, [found], {"status": 400, "message": f"{reason}..."}, _safe(theirs))
        )
    return section


# Replies of the model.


def compare_replies(sides: tuple[Side, Side], replies: Sequence[Reply]) -> Section:
    """What the client gets for a reply, whole and streamed in pieces of several sizes."""
    plugin, in_tree = sides
    section = Section(len(replies), 0, [])
    for reply in replies:
        ours, theirs = observe(plugin, reply), observe(in_tree, reply)
        expected = expected_answers(reply)
        section.plugin_as_expected += not any(why_answers_differ(expected, ours))
        if reasons := why_answers_differ(expected, theirs):
            mode = next(mode for mode in expected if differs(expected[mode], theirs[mode]))
            got = theirs[mode]
            seen = got.shown() if isinstance(got, Answer) else {"raised": got}
            section.differences.append(
                Difference(
                    reply.name,
                    reasons,
                    {"mode": mode, **expected[mode].shown()},
                    {"mode": mode, **seen},
                )
            )
    return section


def expected_answers(reply: Reply) -> dict[str, Answer]:
    """The expected answer in each mode."""
    content, calls = reply.streamed or (reply.content, reply.calls)
    streamed = Answer(reply.reasoning, content, calls)
    whole = {"whole": Answer(reply.reasoning, reply.content, reply.calls)}
    return whole | {_mode(tokens): streamed for tokens in TOKENS_PER_DELTA}


def observe(side: Side, reply: Reply) -> dict[str, Answer | str]:
    """A side's answer in each mode, or the error that it raises."""
    keys = {"tool_choice": reply.tool_choice} if reply.tools else {}
    request = chat_request(reply.tools, thinking=reply.thinking, **keys)
    found: dict[str, Answer | str] = {}
    for tokens in (None, *TOKENS_PER_DELTA):
        try:
            if tokens is None:
                found["whole"] = side.whole(request, reply.text)
            else:
                found[_mode(tokens)] = side.stream(request, cut(side.tokenizer, reply.text, tokens))
        except Exception as error:  # an observation like any other
            found["whole" if tokens is None else _mode(tokens)] = f"{type(error).__name__}: {error}"
    return found


def why_answers_differ(expected: dict[str, Answer], found: dict[str, Answer | str]) -> list[str]:
    """What the client gets wrong in any mode."""
    reasons: dict[str, None] = {}
    for mode, answer in found.items():
        reasons |= dict.fromkeys(symptoms(expected[mode], answer))
    streamed = [answer for mode, answer in found.items() if mode != "whole"]
    if any(answer != streamed[0] for answer in streamed):
        reasons["the answer depends on how many tokens come at a time"] = None
    if reasons and not symptoms(expected["whole"], found["whole"]):
        reasons["only when streamed"] = None
    return list(reasons)


def symptoms(expected: Answer, found: Answer | str) -> list[str]:
    """What is wrong with one answer."""
    if isinstance(found, str):
        return [f"raises {found.partition(':')[0]}"]
    seen = []
    if len(found.calls) > len(expected.calls):
        seen.append("phantom call: text becomes a call")
    elif len(found.calls) < len(expected.calls):
        seen.append("a call is not found")
    for call, right in zip(found.calls, expected.calls, strict=False):
        seen += _call_symptoms(call, right)
    for part, right in ((found.content, expected.content), (found.reasoning, expected.reasoning)):
        if part == right:
            continue
        if part.split() == right.split():
            seen.append("blank lines before calls stay in the content")
        elif len(found.calls) == len(expected.calls):
            is_less = len("".join(part.split())) < len("".join(right.split()))
            seen.append("text is lost" if is_less else "markup is left in the text")
    return list(dict.fromkeys(seen))


def _call_symptoms(found: tuple[str, str], right: tuple[str, str]) -> list[str]:
    if found[0] != right[0]:
        return ["a call has another name"]
    arguments, right_arguments = _json(found[1]), _json(right[1])
    if arguments == right_arguments and repr(arguments) == repr(right_arguments):
        return []
    if isinstance(arguments, str) or isinstance(right_arguments, str):
        # Not JSON: that is right only for a call that the reply's end cut off.
        return ["a call's arguments are not JSON"] if isinstance(arguments, str) else ["a cut call is made whole"]
    if arguments.keys() != right_arguments.keys():
        return ["a call's arguments are lost" if not arguments else "a call has other arguments"]
    return ["an argument has another value or type"]


def differs(expected: Answer, found: Answer | str) -> bool:
    """Whether the client gets anything wrong."""
    return bool(symptoms(expected, found))


def _size(difference: Difference) -> tuple[int, int]:
    """For the choice of an example: one with few reasons, then a short one."""
    return len(difference.reasons), len(str(difference))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _mode(tokens: int) -> str:
    return "streamed at once" if tokens == TOKENS_PER_DELTA[-1] else f"streamed, tokens a delta: {tokens}"


def _safe(outcome: str | dict[str, Any]) -> str | dict[str, Any]:
    """The outcome without lone surrogates, which no file can hold."""
    return outcome if isinstance(outcome, dict) else outcome.encode(errors="backslashreplace").decode()


def print_report(report: dict[str, Any]) -> None:
    """The report as text."""
    print(", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    for key, title in (
        ("histories", "Chat histories: prompts"),
        ("refusals", "Impossible chat histories: HTTP 400 with the reason"),
        ("replies", "Replies of the model: reasoning, content, calls"),
    ):
        section = report[key]
        print(f"\n{title}: {section['inputs']} inputs")
        print(f"  as expected: plugin {section['plugin_as_expected']}, in-tree {section['in_tree_as_expected']}")
        print("  in-tree by reason:")
        for group in section["reasons"]:
            example = group["example"]
            print(f"  {len(group['inputs']):>4}  {group['reason']}")
            print(f"          e.g. {example['name']}")
            for side in ("expected", "in_tree"):
                value = (
                    example[side]
                    if isinstance(example[side], str)
                    else json.dumps(example[side], ensure_ascii=False)
                )
                print(f"            {side.replace('_', '-') + ':':10}{_around(value, example)}")


def _around(value: str, example: dict[str, Any]) -> str:
    """The part of a long prompt around the first difference, on one line."""
    start = 0
    if isinstance(example["expected"], str) and isinstance(example["in_tree"], str):
        pairs = zip(example["expected"], example["in_tree"], strict=False)
        start = max(0, next((i for i, (a, b) in enumerate(pairs) if a != b), 0) - SHOWN // 4)
    part = value[start : start + SHOWN]
    line = part.replace("\n", "\\n")
    return ("..." if start else "") + line + ("..." if start + SHOWN < len(value) else "")


if __name__ == "__main__":
    main()
