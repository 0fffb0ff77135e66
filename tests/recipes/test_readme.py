"""The README: its figures are those of the results, and its commands and links exist."""

import json
import re

import pytest
from recipes.pages import ROOT, Page

from kernel_table.pages import fill, main, overview, whole_table

README = Page(ROOT / "README.md")
RESULTS = ROOT / "eval/results/kernels_h200.json"

ROW = {
    "point": "B=1",
    "us": {"ours": {"triton bf16": 9.22, "triton fp8": 12.8}, "peers": {"FA3 bf16": 15.39}},
    "ratio": 1.669,
    "floor_us": None,
    "launches": {},
    "differences": {},
    "skipped": {},
    "wrong": [],
}
LAUNCHES = {
    "triton bf16": [["prepare", 4.0], ["attend", 5.21]],
    "triton fp8": [],
    "FA3 bf16": [["FlashAttnFwd", 15.2]],
}
GOAL = {"goal": {"geometric_mean": 1.5, "minimum": None}}
LINES = {
    "decode": {
        "title": "decode; peers: FA3",
        "summary": GOAL,
        "rows": [ROW, ROW | {"point": "B=4", "ratio": None, "wrong": ["off"]}],
    },
    "index": {
        "title": "index; peers: none",
        "summary": GOAL,
        "rows": [ROW | {"us": {"ours": {"triton": 5.0}, "peers": {}}, "ratio": None, "floor_us": 2.0}],
    },
    "block": {"title": "block; peers: FA3", "summary": GOAL, "rows": [ROW | {"launches": LAUNCHES}]},
}
MEASURED = {
    "versions": {"vllm": "0.32.0", "torch": "2.13.0", "triton": "3.7.1"},
    "device": {"name": "NVIDIA H200", "capability": "9.0"},
    "lines": LINES,
}


def test_figures_are_those_of_the_results():
    results = json.loads(RESULTS.read_text())
    remedy = f"run PYTHONPATH=eval python -m kernel_table.pages {RESULTS.relative_to(ROOT)} README.md"
    assert fill(README.text, overview(results)) == README.text, remedy
    assert RESULTS.with_suffix(".md").read_text() == whole_table(results), remedy


def test_a_row_for_each_line():
    assert overview(MEASURED).splitlines()[4:] == [
        "| decode | B=1 to B=4, 1 of 2 | 1.67 | 1.5 | 1.67 | 1.67 |",
        "| index | B=1, 0 of 1 | not measured | 1.5 |  |  |",
        "| block | B=1 | 1.67 | 1.5 | 1.67 | 1.67 |",
    ]


def test_rows_of_the_whole_table():
    assert whole_table(MEASURED).splitlines()[7:] == [
        "| decode | B=1 | 9.2 (triton bf16) | 15.4 (FA3 bf16) | 1.67 |  |",
        "| decode | B=4 | sides differ, so no ratio | | |  |",
        "| index | B=1 | 5.0 (triton) | not measured |  | 40% |",
        "| block | B=1 | 9.2 (triton bf16) | 15.4 (FA3 bf16) | 1.67 |  |",
        "",
        "Launches of the attention between its projections, of the best of each side, in a profile:",
        "some start before the last one has ended, and waiting counts.",
        "",
        "| problem | side | microseconds |",
        "|---|---|---|",
        "| B=1 | ours | 2: prepare 4.0, attend 5.2 |",
        "| B=1 | peers | 1: FlashAttnFwd 15.2 |",
    ]


def test_the_tables_are_put_into_pages(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("before\n<!-- kernels: begin -->\nold\n<!-- kernels: end -->\nafter\n")
    results.write_text(json.dumps(MEASURED))
    assert main([str(results), str(page)]) == 0
    assert page.read_text() == (
        f"before\n<!-- kernels: begin -->\n{overview(MEASURED)}<!-- kernels: end -->\nafter\n"
    )
    assert (tmp_path / "results.md").read_text() == whole_table(MEASURED)
    with pytest.raises(ValueError, match="expected one pair of the marks"):
        fill("no marks", "")


def test_what_is_ticked_names_a_command():
    table = README.tables[0]
    ticked = [cell for row in table for cell in row if "✓" in cell]
    assert ticked
    for cell in ticked:
        commands = re.findall(r"`([^`]+)`", cell)
        assert commands, cell
        for command in commands:
            assert (ROOT / command.split()[1]).exists(), command
