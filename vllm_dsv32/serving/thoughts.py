"""Splits a reply into what the model thinks and what it says, incrementally."""

from typing import Final

from vllm_dsv32.serving import tokens as t

_SPACE: Final = " \t\r\n"
# Blank space inside the start of a block of calls beyond this is prose that mentions the tag.
_MAX_SPACE: Final = 16


class ThoughtSplitter:
    """Splits one reply. `feed` it in pieces of any size, then `finish` it.

    Thinking ends at `</think>`, or where a block of calls starts straight in it: the model called a tool and
    forgot to close its thoughts. The block and the blank line before it belong to what is said. A `<think>`
    that repeats the prompt's is dropped.

    A block needs the start of a name: where vLLM forces a call, its grammar takes over at the end of `find_block`'s
    tag, and starts with a block of its own. What it breaks off so stays thought.
    """

    def __init__(self, *, is_thinking: bool) -> None:
        self.is_thinking = is_thinking
        self._is_at_start = True
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str]:
        """Take the next piece of the reply; return the thought and the speech that it settles."""
        if not self.is_thinking:
            return "", piece
        text, self._held = self._held + piece, ""
        if self._is_at_start:
            if len(text) < len(t.THINK_START) and t.THINK_START.startswith(text):
                self._held = text
                return "", ""
            self._is_at_start = False
            text = text.removeprefix(t.THINK_START)

        at = text.find("<")
        while at >= 0:
            if text.startswith(t.THINK_END, at):
                self.is_thinking = False
                return text[:at], text[at + len(t.THINK_END) :]
            starts_block = _starts_block(text, at, t.INVOKE_START)
            if starts_block:
                self.is_thinking = False
                end = len(text[:at].removesuffix(t.CALLS_SEPARATOR))
                return text[:end], text[end:]
            if starts_block is None or t.THINK_END.startswith(text[at : at + len(t.THINK_END)]):
                break
            at = text.find("<", at + 1)
        end = len(text) if at < 0 else at
        # A blank line before a block is held back with it.
        num_newlines = end - len(text[:end].rstrip("\n"))
        end -= min(num_newlines, len(t.CALLS_SEPARATOR))
        self._held = text[end:]
        return text[:end], ""

    def finish(self) -> str:
        """Take the end of the reply; return the thought that was held back."""
        held, self._held = self._held, ""
        return held


def find_block(text: str) -> int:
    """Where the first block of calls, up to its `INVOKE`, starts in `text`; -1 if none does."""
    at = text.find(t.CALLS_START)
    while at >= 0 and not _starts_block(text, at, t.INVOKE):
        at = text.find(t.CALLS_START, at + 1)
    return at


def _starts_block(text: str, at: int, invoke: str) -> bool | None:
    """Whether a block of calls starts at `at`: its tag, blank space, `invoke`. None if that is open yet."""
    head = text[at : at + len(t.CALLS_START)]
    if not t.CALLS_START.startswith(head):
        return False
    if head != t.CALLS_START:
        return None
    after = text[at + len(head) : at + len(head) + _MAX_SPACE + len(invoke)].lstrip(_SPACE)
    if after.startswith(invoke):
        return True
    is_cut = at + len(head) + _MAX_SPACE + len(invoke) > len(text)
    return None if is_cut and invoke.startswith(after) else False
