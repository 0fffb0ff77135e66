"""The figure of cost by context: measured on a CPU at two short lengths, and drawn for both sides."""

import json
from dataclasses import asdict

import context_cost
import matplotlib.image
import pytest
from context_cost import CONTEXTS, KERNELS, TABLE, draw, main, marginal, rows_of
from engine_runs.sides import IN_TREE, PLUGIN
from engine_runs.timed_engine import Timing

from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, make_config

K = 1024


def test_marginal_cost_is_the_derivative():
    def seconds(n):
        return 3e-6 * n + 1e-11 * n * n

    costs = marginal(CONTEXTS, [seconds(n) for n in CONTEXTS])
    for n, before, cost in zip(CONTEXTS, (0, *CONTEXTS), costs, strict=False):
        assert cost == pytest.approx(3e-6 + 1e-11 * (n + before))


def raw(prefill_s, decode_step_s, at_once=1, decode_kernels_s=()):
    """As a child writes it, where a call takes ``at_once`` prompts, each ``prefill_s``."""

    def timing(seconds):
        return asdict(Timing(seconds, seconds, seconds, 1))

    return {
        "prompts_at_once": [at_once] * len(prefill_s),
        "prefill_call_s": [timing(at_once * seconds) for seconds in prefill_s],
        "decode_step_s": [timing(seconds) for seconds in decode_step_s],
        "decode_kernels_s": list(decode_kernels_s),
    }


def test_rows_are_microseconds_a_token():
    rows = rows_of(PLUGIN, [K, 2 * K], raw([0.001, 0.003], [0.008, 0.016], at_once=4), 16)
    assert [row["context"] for row in rows] == [K, 2 * K]
    assert [row["prefill"] for row in rows] == pytest.approx([1e3 / K, 2e3 / K])
    assert [row["decode"] for row in rows] == pytest.approx([500, 1000])


def test_kernels_are_given_where_a_gpu_ran_them():
    rows = rows_of(PLUGIN, [K, 2 * K], raw([0.001, 0.003], [0.008, 0.016], decode_kernels_s=[0.004, 0.006]), 16)
    assert [row[KERNELS] for row in rows] == pytest.approx([250, 375])
    rows = rows_of(PLUGIN, [K], raw([0.001], [0.008], decode_kernels_s=[0.0]), 16)
    assert KERNELS not in rows[0]


def both_sides():
    flat = raw([n * 1e-5 for n in CONTEXTS], [0.01] * len(CONTEXTS), decode_kernels_s=[0.002] * len(CONTEXTS))
    steep = raw(
        [n * 3e-5 for n in CONTEXTS],
        [n * 1e-6 for n in CONTEXTS],
        decode_kernels_s=[0.002 + n * 1e-7 for n in CONTEXTS],
    )
    return [*rows_of(PLUGIN, CONTEXTS, flat, 16), *rows_of(IN_TREE, CONTEXTS, steep, 16)]


def test_figures_compare_the_sides_at_the_longest_context():
    figures = {figure.name: figure.value for figure in context_cost.figures_of(both_sides(), CONTEXTS)}
    assert figures["prefill at 163840 tokens, plugin"] == pytest.approx(10)
    assert figures["prefill at 163840 tokens, in-tree / plugin"] == pytest.approx(3)
    assert figures["decode at 163840 tokens, in-tree / plugin"] == pytest.approx(16.384)
    assert figures["decode, kernels at 163840 tokens, in-tree / plugin"] == pytest.approx(9.192)


def test_both_sides_are_drawn(tmp_path):
    rows = both_sides()
    draw(rows, "both", tmp_path / "both.png")
    draw([row for row in rows if row["side"] == PLUGIN], "both", tmp_path / "one.png")
    both, one = (matplotlib.image.imread(tmp_path / name)[..., :3] for name in ("both.png", "one.png"))
    blue, orange = (0.12, 0.47, 0.71), (1.0, 0.5, 0.05)
    assert is_seen(both, blue)
    assert is_seen(both, orange)
    assert is_seen(one, blue)
    assert not is_seen(one, orange)


def test_without_matplotlib_the_results_are_written_and_the_figure_can_follow(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(context_cost, "find_spec", lambda name: None)
    monkeypatch.setattr(context_cost, "start_sides", lambda *_: [(PLUGIN, None, None), (IN_TREE, None, None)])
    monkeypatch.setattr(context_cost, "run_side", lambda *_: raw([0.001, 0.003], [0.008, 0.016]))
    out = tmp_path / "cost.json"
    main(["--out", str(out), "--new-tokens", "16", "--contexts", "128", "256"])
    assert "matplotlib is not installed: where it is, --redraw cost.json draws it" in capsys.readouterr().out
    assert not out.with_suffix(".png").exists()
    main(["--redraw", str(out)])
    assert out.with_suffix(".png").exists()


def is_seen(image, colour) -> bool:
    """In both halves, on more than a legend's worth of pixels."""
    close = abs(image - colour).max(axis=-1) < 0.03
    middle = close.shape[1] // 2
    return close[:, :middle].sum() > 500 and close[:, middle:].sum() > 500


@pytest.mark.parametrize("contexts", [["512", "256"], ["256", "256"], ["16", "256"]])
def test_contexts_that_do_not_grow_or_are_too_short(contexts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "x.json"), "--new-tokens", "16", "--contexts", *contexts])
    assert "--contexts must grow, from more than 17" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command writes, for the plugin on a CPU and a tiny model."""
    folder = tmp_path_factory.mktemp("cost")
    model = folder / "tiny"
    model.mkdir()
    options = TinyCheckpointOptions(num_hidden_layers=1, num_nextn_predict_layers=0)
    (model / "config.json").write_text(json.dumps(make_config(options)))
    main(
        [
            *("--out", str(folder / "cost.json"), "--model", str(model), "--sides", PLUGIN, "--cache", "auto"),
            *("--dtype", "float32", "--contexts", "128", "256", "--step-tokens", "256", "--batch", "1"),
            *("--new-tokens", "32", "--repeats", "3"),
        ]
    )
    return folder


@pytest.mark.timeout(600)
def test_the_command_measures_and_writes(measured):
    result = json.loads((measured / "cost.json").read_text())
    assert result["system"]["model"] == "tiny"
    assert {"vllm", "vllm-dsv32", "torch"} <= result["system"]["versions"].keys()
    assert result["system"]["device"]
    assert result["settings"]["contexts"] == [128, 256]
    rows = result["tables"][TABLE]
    assert [(row["side"], row["context"]) for row in rows] == [(PLUGIN, 128), (PLUGIN, 256)]
    details = result["details"][PLUGIN]
    assert details["prompts_at_once"] == [8, 4]
    assert rows[0]["prefill"] == pytest.approx(1e6 * details["prefill_call_s"][0]["seconds"] / (8 * 128))
    for timing in (*details["prefill_call_s"], *details["decode_step_s"]):
        assert timing["lowest"] <= timing["seconds"] <= timing["highest"]
        assert timing["num_calls"] == 3
    assert all(row["decode"] > 0 for row in rows)
    page = (measured / "cost.md").read_text()
    assert "![cost by context](cost.png)" in page
    assert matplotlib.image.imread(measured / "cost.png").min() < 0.5


@pytest.mark.timeout(600)
def test_the_figure_can_be_drawn_again(measured):
    before = (measured / "cost.png").read_bytes()
    (measured / "cost.png").unlink()
    main(["--redraw", str(measured / "cost.json")])
    assert (measured / "cost.png").read_bytes() == before
