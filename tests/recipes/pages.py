"""The pages of recipes/, taken apart."""

import importlib.util
import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_BULLET = re.compile(r"^- .*(?:\n  .*)*", re.MULTILINE)
_FLAG = re.compile(r"--[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")
_ASSIGNMENT = re.compile(rf"({_VARIABLE.pattern})=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One shell command: what is set for it, its name, and its arguments."""

    variables: dict[str, str]
    words: list[str]

    @property
    def flags(self) -> list[str]:
        return [word for word in self.words if _FLAG.fullmatch(word)]

    def starts_with(self, *words: str) -> bool:
        return self.words[: len(words)] == list(words)


@dataclass(frozen=True)
class Page:
    """One markdown file."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and content, in order."""
        return _BLOCK.findall(self.text)

    @cached_property
    def prose(self) -> str:
        return _BLOCK.sub("", self.text)

    @cached_property
    def inline_code(self) -> list[str]:
        torn = [line for line in self.prose.splitlines() if line.count("`") % 2]
        assert not torn, f"{self.path.name}: inline code over two lines: {torn}"
        return re.findall(r"`([^`]+)`", self.prose)

    @cached_property
    def commands(self) -> list[Command]:
        """Of the bash blocks."""
        lines = [
            line
            for language, code in self.blocks
            if language == "bash"
            for line in code.replace("\\\n", " ").splitlines()
        ]
        return [parse_command(line) for line in lines if line.strip()]

    @cached_property
    def explained(self) -> set[str]:
        """The flags and variables that a bullet names before its colon."""
        heads = [bullet.partition(": ")[0] for bullet in _BULLET.findall(self.prose)]
        return {name for head in heads for pattern in (_FLAG, _VARIABLE) for name in pattern.findall(head)}

    @cached_property
    def tables(self) -> list[list[list[str]]]:
        """Rows of cells, without the line under the head."""
        tables = re.findall(r"(?:^\|.*\|\n)+", self.prose, re.MULTILINE)
        return [
            [_cells(line) for line in table.splitlines() if not re.fullmatch(r"[|\s:-]+", line)] for table in tables
        ]


def parse_command(line: str) -> Command:
    words = shlex.split(line, comments=True)
    variables = {}
    while words and (match := _ASSIGNMENT.fullmatch(words[0])):
        variables[match[1]] = match[2]
        words = words[1:]
    return Command(variables, words)


def variables_in(text: str) -> set[str]:
    return set(_VARIABLE.findall(text))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def pages(*, clients: bool = False) -> list[Page]:
    """All of them; clients.md, whose blocks are run against a server elsewhere, on request."""
    paths = sorted(RECIPES.glob("*.md"))
    return [Page(path) for path in paths if clients or path.name != "clients.md"]


def load_script(name: str) -> ModuleType:
    """A Python file of recipes/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
