"""The runs of lm_eval have the published settings, and lm_eval itself scores the small model's server."""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval_runs.run import add_run_options, check_free, evaluate_and_report, figures_of, keywords, path_of
from lm_eval_runs.settings import AIME25, GSM8K, GSM8K_20_SHOT, Settings, gsm8k, pass_mark, standard_error
from lm_eval_runs.tasks import load_task
from lm_eval_runs.thinking import check_room

from server.process import MODEL, Server, serve
from small_model.tasks import Chat, arithmetic

pytestmark = pytest.mark.timeout(900)
EVAL = Path(__file__).parents[2] / "eval"

# As published, with the server's address and the model's name.
PUBLISHED_GSM8K = [
    *("lm_eval", "--model", "local-completions", "--model_args"),
    "model=deepseek-ai/DeepSeek-V3.2,base_url=http://0.0.0.0:8000/v1/completions,max_length=8192,"
    "tokenized_requests=False,tokenizer_backend=None,num_concurrent=32",
    *("--tasks", "gsm8k", "--num_fewshot", "5"),
]
PUBLISHED_AIME25 = [
    *("lm_eval", "--model", "local-chat-completions", "--model_args"),
    "model=deepseek-ai/DeepSeek-V3.2,base_url=http://0.0.0.0:8000/v1/chat/completions,tokenized_requests=False,"
    "tokenizer_backend=None,num_concurrent=20,timeout=5000,max_length=72768",
    *("--tasks", "aime25", "--apply_chat_template", "--gen_kwargs"),
    '{"temperature":1.0,"max_gen_toks":72768,"top_p":0.95,"chat_template_kwargs":{"thinking":true}}',
    *("--log_samples", "--output_path", "aime25_ds32"),
]


# The settings.


def parsed(settings: Settings, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_run_options(parser, settings)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(("command", "settings"), [(PUBLISHED_GSM8K, GSM8K), (PUBLISHED_AIME25, AIME25)])
def test_lm_eval_is_told_what_the_published_command_tells_it(command, settings, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command[0], "run", *command[1:]])
    published = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    options = parsed(settings, "--base-url", "http://0.0.0.0:8000/v1/")
    ours = keywords(settings, options, "deepseek-ai/DeepSeek-V3.2")
    assert published.tasks == settings.task or published.tasks == [settings.task]
    for name in ("model", "num_fewshot", "batch_size", "limit", "gen_kwargs", "apply_chat_template"):
        assert ours[name] == getattr(published, name), name
    assert bool(published.fewshot_as_multiturn) == ours["fewshot_as_multiturn"]
    arguments = dict(published.model_args)
    assert arguments.pop("tokenizer_backend") in (None, "None")
    assert ours["model_args"] == arguments | {"tokenizer_backend": None}


def test_20_examples_change_nothing_else():
    options = parsed(GSM8K, "--base-url", "http://0.0.0.0:8000/v1")
    five, twenty = (keywords(settings, options, "m") for settings in (GSM8K, GSM8K_20_SHOT))
    assert twenty == five | {"num_fewshot": 20}


@pytest.mark.parametrize(("settings", "timeout"), [(GSM8K, None), (AIME25, 5000)])
def test_the_timeout_can_be_changed(settings, timeout):
    options = parsed(settings, "--base-url", "http://0.0.0.0:8000/v1")
    assert keywords(settings, options, "m")["model_args"].get("timeout") == timeout
    options = parsed(settings, "--base-url", "http://0.0.0.0:8000/v1", "--timeout", "20000")
    assert keywords(settings, options, "m")["model_args"]["timeout"] == 20000


# The pass marks.


def test_standard_errors_are_the_published_ones():
    assert round(standard_error(0.9560, 1319), 4) == 0.0056
    assert round(standard_error(0.9553, 1319), 4) == 0.0057
    assert round(standard_error(0.9333, 30), 4) == 0.0463


def test_pass_marks():
    assert pass_mark(0.9560, 1319) == pytest.approx(0.9560 - 2 * 0.00565, abs=1e-4)
    assert 25 / 30 < pass_mark(0.9333, 30) < 26 / 30
    assert pass_mark(0.9560, 100) < pass_mark(0.9560, 1319)
    assert pass_mark(0.9560, 1) is None


@pytest.mark.parametrize(
    ("settings", "published", "passed"),
    [
        (GSM8K, 0.9560, [True, False]),
        (GSM8K_20_SHOT, None, [True, False]),
        (gsm8k(5, is_chat=True), None, [None] * 2),
    ],
)
def test_figures_are_held_to_the_marks_of_their_settings(settings, published, passed):
    scores = {
        "alias": "gsm8k",
        "exact_match,flexible-extract": 0.9454,
        "exact_match_stderr,flexible-extract": 0.0063,
        "exact_match,strict-match": 0.9435,
        "exact_match_stderr,strict-match": "N/A",
    }
    flexible, strict = figures_of(settings, scores, 1319)
    assert (flexible.name, flexible.value, flexible.stderr) == ("exact_match, flexible-extract", 0.9454, 0.0063)
    assert flexible.published == published
    assert (strict.stderr, strict.samples) == (None, 1319)
    assert [figure.passed for figure in (flexible, strict)] == passed


def test_a_figure_that_lm_eval_does_not_give_is_missed():
    scores = {"exact_match,flexible-extract": 1.0, "exact_match_stderr,flexible-extract": 0.0}
    given, missing = figures_of(GSM8K, scores, 1319)
    assert (given.passed, missing.name, missing.passed) == (True, "exact_match, strict-match", False)


# Local files.


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 2?"}\n',
            "line 2: .*answer.*, got question",
        ),
        ("question,answer\n", "line 1: .*got no JSON"),
        ("", "is empty"),
    ],
)
def test_files_in_another_format_are_refused(text, message, tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit, match=message):
        load_task("gsm8k", {"train": file, "test": file}, tmp_path)


@pytest.mark.parametrize(
    ("name", "splits", "row"),
    [
        ("gsm8k", ("train", "test"), {"question": "1 + 1?", "answer": "#### 2"}),
        ("aime25", ("test",), {"problem": "1 + 1?", "answer": "2", "id": "0"}),
    ],
)
def test_a_local_file_changes_where_the_data_comes_from_and_nothing_else(name, splits, row, tmp_path):
    import lm_eval.tasks
    import yaml

    class Loader(yaml.SafeLoader):
        """Functions stay names."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    (path,) = Path(lm_eval.tasks.__file__).parent.glob(f"*/{name}.yaml")
    published = yaml.load(path.read_text(), Loader)
    file = write_lines(tmp_path / "lines.jsonl", [row])
    task = load_task(name, dict.fromkeys(splits, file), tmp_path)
    assert list(task.test_docs()) == [row]
    for key, value in published.items():
        if key in ("tag", "dataset_path", "dataset_name"):
            continue
        ours = getattr(task.config, key)
        if key == "process_results":
            assert ours.__name__ == value.partition(".")[2]
        elif key == "metadata":
            assert ours["version"] == value["version"]
        else:
            assert ours == value, key


# The files of a run.


def test_a_run_on_fewer_problems_has_files_of_its_own(tmp_path):
    url = ("--base-url", "http://0.0.0.0:8000/v1")
    assert path_of(parsed(GSM8K, *url), "gsm8k_5_shot").name == "gsm8k_5_shot.json"
    assert path_of(parsed(GSM8K, *url, "--limit", "10"), "gsm8k_5_shot").name == "gsm8k_5_shot_limit_10.json"
    out = tmp_path / "out.json"
    assert path_of(parsed(GSM8K, *url, "--limit", "10", "--out", str(out)), "gsm8k_5_shot") == out


def test_files_that_are_there_are_not_replaced_unasked(tmp_path):
    out, replies = tmp_path / "out.json", tmp_path / "out.unfinished_rank0.db"
    flags = ("--base-url", "http://0.0.0.0:8000/v1", "--out", str(out))
    check_free(parsed(GSM8K, *flags), "")
    replies.touch()
    with pytest.raises(SystemExit, match=r"holds replies of a run that was cut short\. --resume keeps them"):
        check_free(parsed(GSM8K, *flags), "")
    check_free(parsed(GSM8K, *flags, "--resume"), "")
    out.touch()
    for more in ((), ("--resume",)):
        with pytest.raises(SystemExit, match=r"there are results already\. Give another --out, or --overwrite"):
            check_free(parsed(GSM8K, *flags, *more), "")
    check_free(parsed(GSM8K, *flags, "--overwrite"), "")


class CutShort:
    """A server that answers four completions, then none until it is well."""

    def __init__(self):
        self.prompts, self.is_well = [], False

    def handle(self, path, headers, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "m"}]}
        if path != "/v1/completions":
            return 404, {}
        if not self.is_well and len(self.prompts) >= 4:
            return 400, {"error": "out of order"}
        self.prompts.append(body["prompt"])
        return 200, {"choices": [{"index": 0, "text": " It is 1.\n#### 1"}]}


def test_a_run_that_was_cut_short_is_resumed(serve_api, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = CutShort()
    rows = [{"question": f"{number} - {number - 1}?", "answer": "#### 1"} for number in range(9)]
    data = write_lines(tmp_path / "test.jsonl", rows)
    out = tmp_path / "out.json"
    flags = ("--base-url", serve_api(server.handle), "--out", str(out), "--concurrency", "1")

    def evaluate(*more):
        settings, files = gsm8k(0, is_chat=False), {"train": data, "test": data}
        evaluate_and_report(settings, parsed(settings, *flags, *more), files, "title", "stem")

    with pytest.raises(requests.HTTPError):
        evaluate()
    assert not out.exists()
    with pytest.raises(SystemExit, match="--resume keeps them"):
        evaluate()
    server.is_well = True
    with pytest.raises(SystemExit) as ended:
        evaluate("--resume")
    assert ended.value.code == 0
    assert len(server.prompts) == len(set(server.prompts)) == 9, "each was asked once"
    result = json.loads(out.read_text())
    assert [figure["value"] for figure in result["figures"]] == [1.0, 1.0]
    assert result["settings"]["resumed"] is True
    assert len(samples_of(out)) == 2 * 9
    assert not list(tmp_path.glob("*.db"))
    with pytest.raises(SystemExit):
        evaluate("--overwrite", "--limit", "1")
    assert len(server.prompts) == 9 + 1
    assert json.loads(out.read_text())["settings"]["resumed"] is False


# lm_eval and a server.


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tmp_path_factory.mktemp("small") / "model"
    model.symlink_to(EVAL / "small_model" / "checkpoint")
    with serve(model, "--dtype", "float32", "--max-model-len", "4096") as running:
        yield running


def run(server: Server, script: str, out: Path, *arguments: str | Path, status: int | None = 0) -> str:
    """What a command prints; its results are beside `out`. A status of None is that of the results."""
    command = [sys.executable, EVAL / script, "--base-url", f"{server.url}/v1", "--out", out, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"NO_PROXY": "127.0.0.1"}, timeout=600
    )
    if status is None:
        status = int(not json.loads(out.read_text())["passed"])
    assert done.returncode == status, done.stderr
    return done.stdout if out.exists() else done.stderr


def sums(num: int) -> list[Chat]:
    """Held-out problems of one step, which the small model can do even with words around them."""
    source = random.Random(11)
    chats = []
    while len(chats) < num:
        chat = arithmetic(source, "test")
        work = chat.messages[-1].get("reasoning") or chat.messages[-1]["content"].rpartition("\n")[0]
        if "\n" not in work:
            chats.append(chat)
    return chats


def gsm8k_rows(num: int) -> list[dict[str, str]]:
    rows = []
    for chat in sums(num):
        last = chat.messages[-1]
        work = "\n".join(filter(None, (last.get("reasoning"), last["content"])))
        rows.append({"question": chat.messages[0]["content"], "answer": work})
    return rows


def samples_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.with_suffix(".samples.jsonl").read_text().splitlines()]


def test_gsm8k_scores_sums_that_the_model_can_do(server, tmp_path):
    rows = gsm8k_rows(24)
    data, out = write_lines(tmp_path / "test.jsonl", rows), tmp_path / "sums.json"
    files = ("--data", data, "--examples-data", data)
    page = run(server, "gsm8k.py", out, "--chat", "--examples", "0", "--server-is-here", *files)
    result = json.loads(out.read_text())
    flexible, strict = result["figures"]
    print(flexible, strict)
    assert flexible["value"] >= 0.2
    assert strict["value"] >= 0.2
    assert flexible["samples"] == len(rows)
    assert flexible["passed"] is None
    for sample in samples_of(out):
        assert sample["right"] == (sample["extracted"].strip() == sample["target"].partition("#### ")[2])
    assert result["system"]["model"] == MODEL
    assert {"vllm-dsv32", "vllm", "torch"} <= result["system"]["versions"].keys()
    assert all(result["system"]["versions"].values())
    assert result["system"]["device"]
    assert result["settings"]["data"]["test"]["lines"] == len(rows)
    assert page.strip() == out.with_suffix(".md").read_text().strip()
    assert str(tmp_path) not in out.read_text() + page, "a path"


def test_gsm8k_as_published_gives_what_the_answers_deserve(server, tmp_path):
    """The model cannot do sums in this form; but what it says is scored, against other answers and its own."""
    rows = gsm8k_rows(32)
    rows, examples = rows[:6], write_lines(tmp_path / "train.jsonl", rows[6:])

    def score(name: str, rows: list[dict[str, str]], status: int | None) -> tuple[dict, Path]:
        data, out = write_lines(tmp_path / f"{name}.jsonl", rows), tmp_path / f"{name}.json"
        run(server, "gsm8k.py", out, "--data", data, "--examples-data", examples, status=status)
        return json.loads(out.read_text()), out

    wrong, out = score("wrong", [row | {"answer": "#### 987654"} for row in rows], status=1)
    assert [figure["value"] for figure in wrong["figures"]] == [0, 0]
    assert [figure["passed"] for figure in wrong["figures"]] == [False, False]
    assert wrong["settings"]["generation"]["temperature"] == 0
    assert wrong["settings"]["examples"] == 5
    assert "**no**" in out.with_suffix(".md").read_text()

    # The same prompts again, as the examples that are drawn go by the problem's place in the file.
    samples = [sample for sample in samples_of(out) if sample["filter"] == "flexible-extract"]
    own = [rows[sample["problem"]] | {"answer": f"#### {sample['extracted']}"} for sample in samples]
    right, _ = score("right", own, status=None)
    flexible, _ = right["figures"]
    assert flexible["value"] > 0.6
    assert flexible["published"] == 0.956


def test_aime25_scores_the_content_without_the_reasoning(server, tmp_path):
    """A reply without a box is compared as a whole, so reasoning in front of it would make it wrong."""
    rows = [
        {"id": str(index), "problem": chat.messages[0]["content"], "answer": chat.answer}
        for index, chat in enumerate(sums(12))
    ]
    data, out = write_lines(tmp_path / "test.jsonl", rows), tmp_path / "aime25.json"
    run(server, "aime25.py", out, "--data", data, "--max-tokens", "60", "--concurrency", "8", status=1)
    result = json.loads(out.read_text())
    (figure,) = result["figures"]
    print(figure)
    assert figure["value"] > 0
    assert figure["passed"] is False
    right = [sample for sample in samples_of(out) if sample["right"]]
    assert len(right) == round(figure["value"] * len(rows))
    assert all(sample["reply"] == sample["target"] for sample in right)
    assert result["settings"]["generation"]["chat_template_kwargs"] == {"thinking": True}
    assert result["settings"]["generation"]["temperature"] == 1.0
    wrong = write_lines(tmp_path / "wrong.jsonl", [row | {"answer": "987654"} for row in rows[:4]])
    run(server, "aime25.py", out, "--data", wrong, "--max-tokens", "60", "--overwrite", status=1)
    assert json.loads(out.read_text())["figures"][0]["value"] == 0


def test_aime25_refuses_a_server_with_too_short_a_context(server, tmp_path):
    said = run(server, "aime25.py", tmp_path / "out.json", status=1)
    assert "72768" in said
    assert "--max-model-len is 4096" in said


def test_there_must_be_room_for_a_prompt():
    with pytest.raises(SystemExit, match=r"Replies may take 100 tokens.*--max-model-len is 100"):
        check_room(100, 100)
    check_room(101, 100)
    check_room(None, 100)


def test_aime25_refuses_a_server_that_does_not_set_reasoning_apart(tmp_path):
    model = tmp_path / "model"
    model.symlink_to(EVAL / "small_model" / "checkpoint")
    data = write_lines(tmp_path / "test.jsonl", [{"id": "0", "problem": "1 + 1?", "answer": "2"}])
    out = tmp_path / "out.json"
    with serve(model, "--dtype", "float32", "--max-model-len", "1024", "--reasoning-parser", "") as server:
        said = run(server, "aime25.py", out, "--data", data, "--max-tokens", "60", status=1)
    assert "expected the reply's reasoning apart from its content (message.reasoning), got content alone" in said
    assert "</think>" in said, "what the reply was, in which the reasoning is"
    assert "--reasoning-parser deepseek_v3" in said
    assert not out.exists(), "nothing was scored"


def test_results_go_into_a_json_file(server, tmp_path):
    said = run(server, "aime25.py", tmp_path / "out.txt", status=2)
    assert "expected a name that ends in .json" in said


def test_an_unknown_model_is_refused(server, tmp_path):
    said = run(server, "gsm8k.py", tmp_path / "out.json", "--model", "another", status=1)
    assert f"--model another: the server has {MODEL}" in said
