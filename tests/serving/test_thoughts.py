import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.replies import cut
from text_cases.histories import block, invoke
from text_cases.replies import CITY
from vllm_dsv32.serving.thoughts import ThoughtSplitter, find_block

BLOCK = block(invoke("weather", CITY))


def split(pieces, is_thinking=True):
    splitter = ThoughtSplitter(is_thinking=is_thinking)
    settled = [splitter.feed(piece) for piece in pieces]
    thought = "".join(thought for thought, _ in settled) + splitter.finish()
    return thought, "".join(speech for _, speech in settled)


REPLIES = {
    "closed": ("hm</think>Hi", "hm", "Hi"),
    "closed, blank lines kept": ("hm\n\n</think>\n\nHi\n", "hm\n\n", "\n\nHi\n"),
    "closed at once": ("</think>Hi", "", "Hi"),
    "nothing said": ("hm</think>", "hm", ""),
    "never closed": ("hm\n\n", "hm\n\n", ""),
    "nothing": ("", "", ""),
    "opened again": ("<think>hm</think>Hi", "hm", "Hi"),
    "opened in the middle": ("a<think>b</think>c", "a<think>b", "c"),
    "closed twice": ("a</think>b</think>c", "a", "b</think>c"),
    "less than": ("1 < 2 </ 3 <th</think>4", "1 < 2 </ 3 <th", "4"),
    "cut in a tag": ("hm</thi", "hm</thi", ""),
    # A call straight in the thinking.
    "block": ("hm" + BLOCK, "hm", BLOCK),
    "block at once": (BLOCK, "", BLOCK),
    "block without a blank line": ("hm" + BLOCK.strip(), "hm", BLOCK.strip()),
    "block after much blank": ("hm\n\n" + BLOCK, "hm\n\n", BLOCK),
    "block after the close": ("hm</think>" + BLOCK, "hm", BLOCK),
    "block, then a close": (f"hm{BLOCK}</think>", "hm", f"{BLOCK}</think>"),
    # Only talk of one.
    "the tag": ("a <｜DSML｜function_calls> block</think>b", "a <｜DSML｜function_calls> block", "b"),
    "the tag last": ("a <｜DSML｜function_calls>", "a <｜DSML｜function_calls>", ""),
    "an invoke without a name": (
        "a <｜DSML｜function_calls>\n<｜DSML｜invoke></think>b",
        "a <｜DSML｜function_calls>\n<｜DSML｜invoke>",
        "b",
    ),
    "an invoke": ('a <｜DSML｜invoke name="f"></think>b', 'a <｜DSML｜invoke name="f">', "b"),
    "far apart": (
        f"<｜DSML｜function_calls>{' ' * 40}<｜DSML｜invoke",
        f"<｜DSML｜function_calls>{' ' * 40}<｜DSML｜invoke",
        "",
    ),
}


@pytest.mark.parametrize("name", REPLIES)
def test_reply(name):
    reply, thought, speech = REPLIES[name]
    assert split([reply]) == (thought, speech)
    assert split(reply) == (thought, speech), "character by character"
    for seed in range(10):
        assert split(cut(reply, seed)) == (thought, speech)


@pytest.mark.parametrize("name", REPLIES)
def test_without_thinking_all_is_speech(name):
    reply = REPLIES[name][0]
    assert split(reply, is_thinking=False) == ("", reply)


SOUP = st.lists(
    st.sampled_from(
        [
            "a",
            "\n",
            "\n\n",
            "<",
            "<think>",
            "</think>",
            "</thi",
            "<｜DSML｜function_calls>",
            "<｜DSML｜invoke",
            ' name="',
            "<｜DSML",
        ]
    )
).map("".join)


@given(reply=SOUP, seed=st.integers(0, 1000))
def test_chunking_never_matters_and_nothing_is_lost(reply, seed):
    at_once = split([reply])
    assert split(reply) == at_once
    assert split(cut(reply, seed)) == at_once
    body = reply.removeprefix("<think>")
    assert body in ("".join(at_once), "</think>".join(at_once))


def test_thoughts_stream_as_they_come():
    splitter = ThoughtSplitter(is_thinking=True)
    pieces = ["I ", "th", "ink <", "b\n", "\n", "x", "</th", "ink>", "so"]
    settled = [splitter.feed(piece) for piece in pieces]
    assert settled == [
        ("I ", ""), ("th", ""), ("ink ", ""), ("<b", ""), ("", ""), ("\n\nx", ""), ("", ""), ("", ""), ("", "so"),
    ]  # fmt: skip


@pytest.mark.parametrize("piece", ["word ", "\n", "<", "<｜DSML｜function_calls>", " "])
def test_work_per_piece_does_not_grow(piece):
    def seconds(num_pieces):
        splitter = ThoughtSplitter(is_thinking=True)
        splitter.feed("<｜DSML｜function_calls>")
        start = time.process_time()
        for _ in range(num_pieces):
            splitter.feed(piece)
        return time.process_time() - start

    seconds(100)
    assert min(seconds(16_000) for _ in range(3)) < 40 * min(seconds(2_000) for _ in range(3))


def test_find_block():
    assert find_block("x" + BLOCK.strip()) == 1
    assert find_block("<｜DSML｜function_calls> x" + BLOCK.strip()) == len("<｜DSML｜function_calls> x")
    assert find_block("<｜DSML｜function_calls> x") == -1
