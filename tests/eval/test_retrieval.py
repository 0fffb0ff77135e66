"""The retrieval evaluation on models that are functions; tests/eval/test_served_runs.py has it on a server."""

import json
import math
import random
import re

import pytest
import retrieval
from results_file import System
from retrieval import attempts, main, measure_scale, num_tokens_of, summary
from serving_runs.haystacks import DEPTH_BANDS, TEXTS, prose


def num_tokens(prompt: str) -> int:
    return 11 + round(1.37 * len(prompt.split()))


def reader(prompt: str, max_tokens: int) -> tuple[str, int]:
    """A model that finds everything."""
    *text, question = re.split(r"\n(?=Question|What is)", prompt)
    names = re.findall(r"(?:of|and of) (?:the )?(\w+ \w+)", question.replace("locker code of", "of"))
    codes = dict(re.findall(r"code of (?:the )?(\w+ \w+) is (\d+)\.", "\n".join(text)))
    return ", ".join(codes.get(name, "unknown") for name in names), num_tokens(prompt)


def short_sighted_reader(prompt: str, max_tokens: int) -> tuple[str, int]:
    """A model that has forgotten the first half."""
    return reader(prompt[len(prompt) // 2 :], max_tokens)[0], num_tokens(prompt)


def read(ask, text: str, length: str, num: int):
    scale = measure_scale(ask, text, num_tokens_of(length))
    return attempts(ask, text, scale, length, num, streams=4, max_tokens=64)


@pytest.mark.parametrize("text", TEXTS)
def test_a_reader_finds_all_and_each_prompt_has_its_length(text):
    made = read(reader, text, "8K", 20)
    row = summary("8K", made)
    assert row["right"] == row["texts"] == 20
    for attempt in made:
        assert 0.93 * 8192 < attempt.num_prompt_tokens <= 8192 - 64


def test_needles_stand_at_every_depth_and_a_lost_half_shows():
    made = read(short_sighted_reader, "prose", "4K", 40)
    row = summary("4K", made)
    assert row["right"] < 30
    bands = [tuple(map(int, band.split("/"))) for band in row["found by depth"].split(", ")]
    assert len(bands) == DEPTH_BANDS
    assert all(num >= 5 for _, num in bands)
    assert [found for found, _ in bands[:2]] == [0, 0]
    assert all(found == num for found, num in bands[3:])


@pytest.mark.parametrize("answer", ["", "{0} 1", "1{0}", "it is unknown", "{0}, {0}"])
def test_an_answer_with_other_numbers_is_wrong(answer):
    def ask(prompt, max_tokens):
        right, num = reader(prompt, max_tokens)
        return answer.format(right), num

    assert not any(attempt.is_right for attempt in read(ask, "prose", "1K", 5))


def test_the_order_of_several_codes_counts():
    def ask(prompt, max_tokens):
        right, num = reader(prompt, max_tokens)
        return ", ".join(reversed(right.split(", "))), num

    for attempt in read(ask, "prose", "1K", 20):
        assert attempt.is_right == (len(attempt.haystack.codes) == 1)


def test_codes_stand_once_among_codes_of_half_the_name():
    for index in range(20):
        made = prose(random.Random(index), 800, index)
        text, _, question = made.prompt.partition("\n\nQuestion: ")
        people = re.findall(r"The locker code of (\w+) (\w+) is (\d+)\.", text)
        assert len({code for *_, code in people}) == len(people) >= 5 * len(made.codes)
        asked = [(first, last) for first, last, code in people if code in made.codes]
        assert len(asked) == len(made.codes)
        assert all(f"{first} {last}" in question for first, last in asked)
        for first, last, _ in people:
            assert any(first == one or last == other for one, other in asked)


def test_lengths():
    assert [num_tokens_of(length) for length in ("3K", "128K", "512")] == [3072, 131072, 512]
    for wrong in ("8k", "0", "-1", "1.5K", ""):
        with pytest.raises(ValueError, match="is not a length: give tokens"):
            num_tokens_of(wrong)


def test_a_length_that_holds_no_text_is_refused():
    with pytest.raises(ValueError, match="100 tokens do not hold a text and an answer of 64"):
        read(reader, "prose", "100", 1)


@pytest.fixture
def served(monkeypatch):
    """A reader on a server of 16K, which fails from the sixth text on."""
    asked = []

    def ask_server(chat, prompt, max_tokens, *, thinking):
        asked.append(prompt)
        if len(asked) > 2 + 5:  # two to measure the scale
            raise RuntimeError("the server is gone")
        return reader(prompt, max_tokens)

    monkeypatch.setattr(retrieval, "served_system", lambda options: System("reader", max_model_len=16384))
    monkeypatch.setattr(retrieval, "ask_server", ask_server)
    return asked


def test_lengths_that_the_server_refuses_are_refused_before_it_is_asked(served):
    with pytest.raises(SystemExit, match=r"--max-model-len is 16384: it would refuse texts of 32K, 128K\."):
        main(["--base-url", "http://127.0.0.1:1/v1"])
    assert served == []


def test_a_length_is_written_before_the_next_one_is_measured(served, tmp_path):
    out = tmp_path / "out.json"
    flags = ["--texts", "5", "--lengths", "3K", "16K", "--out", str(out)]
    with pytest.raises(RuntimeError, match="the server is gone"):
        main(["--base-url", "http://127.0.0.1:1/v1", *flags])
    result = json.loads(out.read_text())
    done, missing = result["figures"]
    assert (done["name"], done["value"], done["passed"]) == ("right at 3K", 1.0, True)
    assert math.isnan(missing["value"])
    assert (missing["name"], missing["passed"], result["passed"]) == ("right at 16K", False, False)
    assert [row["length"] for row in result["tables"]["By length"]] == ["3K"]
    assert "lengths without a number were not measured" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("length", "complaint"), [("8k", "'8k' is not a length"), ("500", "500 tokens do not hold")]
)
def test_the_command_refuses_lengths_before_it_asks(length, complaint, capsys):
    with pytest.raises(SystemExit):
        main(["--base-url", "http://127.0.0.1:1/v1", "--lengths", "8K", length])
    assert complaint in capsys.readouterr().err
