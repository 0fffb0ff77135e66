"""The shell scripts parse, and say what they do; running them whole takes minutes and a package index."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / path for path in ("recipes/make_env.sh", "recipes/quickstart.sh", "tests/run.sh", ".ci/run")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_at_errors(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert os.access(script, os.X_OK)
    assert "set -" in text or "exec " in text


def test_quickstart_explains_itself() -> None:
    shown = subprocess.run(["bash", ROOT / "recipes/quickstart.sh", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--keep" in shown.stdout
    refused = subprocess.run(["bash", ROOT / "recipes/quickstart.sh", "--kep"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--kep" in refused.stderr


def test_make_env_refuses_a_python_that_does_not_suit(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = subprocess.run(
        ["bash", ROOT / "recipes/make_env.sh"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(old)},
    )
    assert refused.returncode == 1
    assert f"PYTHON={old} is not a Python 3.11 or 3.12" in refused.stderr
