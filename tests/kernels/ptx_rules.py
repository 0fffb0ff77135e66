"""What must be in the PTX of a kernel, and what must not."""

import re

__all__ = ["negated_extrema", "waits", "waits_first"]

_DEFINITION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s+(%r\d+),", re.MULTILINE)
_EXTREMUM = re.compile(r"^\s*(?:max|min)\.s32\s+%\w+, (%\w+), (%?-?\w+);", re.MULTILINE)
_COMMENT = re.compile(r"//.*")
_DECLARATION = re.compile(r"\$L__(?:func_begin|tmp)\d+:|\.(?:reg|loc)\b")
_BEFORE_WAITING = re.compile(
    r"griddepcontrol\.launch_dependents;|(?:@!?%p\d+ )?"
    r"(?:ld\.param|ld\.shared|mov|setp|bar\.sync|tcgen05\.alloc|tcgen05\.relinquish_alloc_permit)\b"
)


def waits(ptx: str) -> bool:
    """Whether a kernel waits anywhere for launches before, or lets those after it begin."""
    return "griddepcontrol" in ptx


def waits_first(ptx: str) -> bool:
    """Whether kernels wait for launches before in all of their threads, and before they do anything else.

    They may read their own arguments before, and allocate tensor memory. There may be no access to global memory,
    no branch or place to branch to, no end and no call.
    """
    kernels = [entry.partition("\n{")[2] for entry in re.split(r"\.entry\b", ptx)[1:]]
    return bool(kernels) and all(_waits_first(body) for body in kernels)


def _waits_first(body: str) -> bool:
    for line in map(str.strip, _COMMENT.sub("", body).splitlines()):
        if line.startswith("griddepcontrol.wait;"):
            return True
        if line and not _DECLARATION.match(line) and not _BEFORE_WAITING.match(line):
            return False
    return False


def negated_extrema(ptx: str) -> int:
    """How often an integer maximum or minimum is taken of a negated register.

    Where ptxas (12.8 to 13.0, SM 90 and 100) joins two of them into one instruction of three operands, it loses
    the negation of the second: ``max(max(-a, -b), -c)`` becomes ``max(-a, b, -c)``. ``~x`` orders integers as
    ``-x`` does and is not affected; nor is a variable of a loop, which is negated before the loop and defined
    again in it. Names of registers repeat from function to function.
    """
    count = 0
    for function in re.split(r"\.(?:entry|func)\b", ptx)[1:]:
        kinds: dict[str, set[str]] = {}
        for instruction, register in _DEFINITION.findall(function):
            kinds.setdefault(register, set()).add(instruction)
        negatives = {register for register, instructions in kinds.items() if instructions == {"neg.s32"}}
        count += sum(bool(negatives & set(operands)) for operands in _EXTREMUM.findall(function))
    return count
