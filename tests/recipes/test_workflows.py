"""The workflows are well formed, and what they run is there."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from recipes.pages import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
_PATH = re.compile(r"(?<![\w./-])(?:recipes|tests|eval|\.ci)/[\w./-]*\w")


def load(path: Path) -> dict:
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # which leaves the key "on" a word


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert all(int(job["timeout-minutes"]) <= 120 for job in workflow["jobs"].values())
    scripts = [step["run"] for step in steps(workflow) if "run" in step]
    assert scripts
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        for name in _PATH.findall(script):
            assert (ROOT / name).exists(), name


def test_what_runs_when():
    events = {path.stem: set(load(path)["on"]) for path in WORKFLOWS}
    assert events == {
        "gpu": {"workflow_dispatch"},
        "lint": {"push", "pull_request"},
        "tests": {"push", "pull_request"},
        "versions": {"push", "pull_request"},
        "wheel": {"push", "pull_request"},
    }


def test_lint_checks_what_a_developer_checks():
    """Each check of tests/run.sh but the tests."""
    script = (ROOT / "tests/run.sh").read_text()
    checks = re.findall(r'^check "[^"]+" "\$BIN/(.+)$', script, re.MULTILINE)
    wanted = {check.replace('"', "") for check in checks if not check.startswith("pytest")}
    lint = next(path for path in WORKFLOWS if path.stem == "lint")
    ran = {step["run"].removeprefix(".venv/bin/") for step in steps(load(lint)) if "run" in step}
    assert len(wanted) == 4
    assert wanted <= ran
