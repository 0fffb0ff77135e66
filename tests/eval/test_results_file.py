"""What the evaluations of a server share: whose server it is, its key, the files, and what code was measured."""

import argparse
import subprocess
from pathlib import Path

import bench_serve
import pytest
import retrieval
import this_machine
import tool_calls
from results_file import add_server_options, served_system
from serving_runs.chat import open_client

from small_model.demo import streamed
from small_model.repliers import served

MODELS = {"object": "list", "data": [{"id": "small", "object": "model", "created": 0, "owned_by": "us"}]}


@pytest.fixture
def url(serve_api, monkeypatch):
    """Of a server that wants a key."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def handle(path, headers, body):
        if headers.get("Authorization") != "Bearer right":
            return 401, {"error": "Unauthorized"}
        return (200, MODELS) if path == "/v1/models" else (404, {})

    return serve_api(handle)


def system_of(url: str):
    parser = argparse.ArgumentParser()
    add_server_options(parser)
    return served_system(parser.parse_args(["--base-url", url]))


@pytest.mark.parametrize("key", [None, "", "wrong"])
def test_a_server_that_wants_another_key_is_reported(url, monkeypatch, key):
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit, match=r"/v1/models: the server wants a key, not what OPENAI_API_KEY is"):
        system_of(url)


def test_a_key_is_read_from_the_environment(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    assert system_of(url).model == "small"
    assert [model.id for model in open_client(url, timeout=60).models.list()] == ["small"]
    # They ask for the models.
    served(url)
    streamed(url)


def test_another_answer_is_reported_with_its_status(serve_api):
    url = serve_api(lambda path, headers, body: (502, "no gateway"))
    with pytest.raises(SystemExit, match="expected a list of models, got no JSON, with status 502"):
        system_of(url)


@pytest.mark.parametrize("evaluation", [bench_serve, retrieval, tool_calls])
def test_results_go_into_a_json_file(evaluation, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--base-url", "http://127.0.0.1:1/v1", "--out", "out.txt"])
    assert "expected a name that ends in .json, got out.txt" in capsys.readouterr().err


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_is_that_of_a_checkout_with_the_package(tmp_path, monkeypatch):
    for name in ("measured", "installed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert this_machine._revision("measured") is None
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "measured")
    git(tmp_path, "commit", "--quiet", "--message", "m")
    assert this_machine._revision("measured") == git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "measured" / "__init__.py").write_text("changed = True")
    assert this_machine._revision("measured").endswith("-dirty")
    assert this_machine._revision("installed") is None, "it is in the folder, not in the checkout"
    assert this_machine._revision("missing") is None


def test_versions_name_the_revision_if_there_is_one(monkeypatch):
    monkeypatch.setattr(this_machine, "_revision", {"vllm_dsv32": "abc-dirty"}.get)
    assert this_machine.installed_versions()["revision"] == "abc-dirty"
    monkeypatch.setattr(this_machine, "_revision", {}.get)
    assert "revision" not in this_machine.installed_versions()
