"""What must not be in the PTX of a kernel."""

import re

__all__ = ["negated_extrema"]

_DEFINITION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s+(%r\d+),", re.MULTILINE)
_EXTREMUM = re.compile(r"^\s*(?:max|min)\.s32\s+%\w+, (%\w+), (%?-?\w+);", re.MULTILINE)


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
