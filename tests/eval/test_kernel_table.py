"""The kernel benchmark without a GPU: its arithmetic, and its rows from the references in place of kernels."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kernel_table import decode_block, measurements, peers
from kernel_table.agreement import num_wrong_rows, relative_difference
from kernel_table.problems import BLOCK_SIZE, SparseProblem
from kernel_table.table import Goal, Row, report, row_text, summary, summary_text
from vllm_dsv32.kernels import dispatch, index_logits, selection, sparse_mla, topk_select

SCRIPT = Path(__file__).parents[2] / "eval/kernels.py"


def timed(ours, peers):
    return Row("x", ours={"a": ours, "b": 2 * ours}, peers={"c": peers, "d": 3 * peers})


def test_a_ratio_is_of_the_best_of_each_side():
    assert timed(2.0, 3.0).ratio == 1.5
    assert Row("x", ours={"a": 1.0}).ratio is None
    assert Row("x", peers={"a": 1.0}).ratio is None
    assert replace(timed(2.0, 3.0), wrong=["it is"]).ratio is None


@pytest.mark.parametrize(
    ("ratios", "goal", "met"),
    [
        ([1.0, 2.0], Goal(1.4), True),
        ([1.0, 2.0], Goal(1.5), False),
        ([1.0, 2.0], Goal(1.4, 1.0), True),
        ([1.0, 2.0], Goal(1.4, 1.1), False),
        ([], Goal(1.0), None),
    ],
)
def test_a_goal_is_met_by_the_mean_and_the_minimum(ratios, goal, met):
    values = summary([timed(1.0, ratio) for ratio in ratios], goal)
    assert values["met"] is met
    if ratios:
        assert values["geometric_mean"] == pytest.approx(math.sqrt(2.0))
        assert values["minimum"] == 1.0
        assert "geometric mean 1.41, minimum 1.00 of 2 of 2 rows" in summary_text(values)
    else:
        assert "no row has a ratio" in summary_text(values)
    assert summary_text(values).endswith({True: "met", False: "missed", None: "not judged"}[met])


def test_a_wrong_row_misses_the_goal_and_is_left_out_of_the_mean():
    rows = [timed(1.0, 2.0), replace(timed(1.0, 9.0), wrong=["logits: relative difference 1"])]
    values = summary(rows, Goal(1.0))
    assert (values["met"], values["num_wrong"], values["geometric_mean"]) == (False, 1, pytest.approx(2.0))
    assert "WRONG: logits: relative difference 1" in row_text(rows[1])


def test_what_was_skipped_is_said():
    row = Row("B=1", ours={"triton": 1.0}, skipped={"FA3": "is not here"})
    assert "FA3 skipped: is not here" in row_text(row)
    assert "peers: none" in row_text(row)
    assert report([row])[0]["skipped"] == {"FA3": "is not here"}


def test_relative_difference():
    wanted = torch.tensor([1.0, -4.0, 2.0])
    assert relative_difference(wanted + torch.tensor([0.0, 0.0, 1.0]), wanted) == 0.25
    assert relative_difference(wanted * torch.nan, wanted) == math.inf
    hidden = torch.tensor([1.0, -4.0, math.nan])
    assert relative_difference(hidden, wanted, torch.tensor([True, True, False])) == 0.0


@pytest.mark.parametrize(
    ("selected", "num_keys", "num_wrong"),
    [
        ([0, 2], 4, 0),
        ([2, 0], 4, 0),
        ([2, 1], 4, 0),  # a tie
        ([2, 3], 4, 1),
        ([2, 2], 4, 1),
        ([2, -1], 4, 1),
        ([2, 4], 4, 1),  # past the row's keys
        ([0, -1], 1, 0),
        ([0, 1], 1, 1),
        ([-1, -1], 0, 0),
    ],
)
def test_wrong_selections_are_counted(selected, num_keys, num_wrong):
    logits = torch.tensor([[1.0, 1.0, 2.0, 0.0, 9.0]])
    got = num_wrong_rows(
        logits, torch.tensor([num_keys], dtype=torch.int32), torch.tensor([selected], dtype=torch.int32)
    )
    assert got == num_wrong


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture
def small(monkeypatch):
    """Few inputs and rows on the CPU, where the table chooses the references; ours takes 2 us and peers 3."""
    problem = measurements.problem

    def on_cpu(*args, **kwargs):
        return replace(problem(*args, **kwargs), device_type="cpu", capability=None)

    def microseconds(contestants):
        for calls in contestants.values():
            calls[0]()
        return {name: 2.0 if name.startswith("reference") else 3.0 for name in contestants}

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measurements, "problem", on_cpu)
    monkeypatch.setattr(measurements, "_num_inputs", lambda nbytes: 2)
    monkeypatch.setattr(measurements, "microseconds", microseconds)
    monkeypatch.setattr(measurements, "launches", lambda calls: [("kernel", 2.0)] * 4)
    monkeypatch.setattr(measurements, "copy_bandwidth", lambda: 4e6)
    monkeypatch.setattr(measurements, "PREFILL_ROWS", 6)
    monkeypatch.setattr(selection, "LOGITS_NBYTES", 4 * 4096 * 4)
    monkeypatch.setattr(measurements, "VLLM_LOGITS_NBYTES", 4 * 4096 * 5)
    monkeypatch.setattr(measurements, "_INDEX_BLOCKS", 128)
    monkeypatch.setattr(measurements, "_LATENT_BLOCKS", 64)
    measurements._latent_caches.cache_clear()
    measurements._index_keys.cache_clear()
    torch.manual_seed(0)
    with OnCpu():
        yield
    measurements._latent_caches.cache_clear()
    measurements._index_keys.cache_clear()


ROWS = {
    "sparse decode": lambda: measurements.sparse_decode(16, 2),
    "sparse prefill": lambda: measurements.sparse_prefill(16, 4096),
    "index decode": lambda: measurements.index_decode(2, 4096),
    "index prefill": lambda: measurements.index_prefill(4096),
}


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
def test_without_peers_ours_is_checked_and_timed(small, make):
    row = make()
    assert row.wrong == []
    assert set(row.ours.values()) == {2.0}
    assert all(name.startswith("reference") for name in row.ours)
    assert row.peers == {}
    assert row.ratio is None
    assert row.skipped
    assert set(row.skipped.values()) == {"takes CUDA devices, got cpu"}
    assert [name for name in row.differences if name.endswith("vs reference")]


def test_neighbours_share_rows(small):
    slots = SparseProblem.random(5, 1, 1 << 30, overlap=0.8).slots
    assert slots.shape == (5, 2048)
    for row, following in itertools.pairwise(slots.tolist()):
        assert len(set(row) & set(following)) == 2048 - 410
    assert measurements.sparse_prefill(16, 4096, 0.8).point == "6 x 4K, 0.8 shared"


def attention_peer(factor=1.0, error=None):
    def make(problem, cache, scale, **_):
        def call():
            if error:
                raise RuntimeError(error)
            out, _ = sparse_mla.reference(problem.q, cache, problem.slots, problem.num_valid, scale)
            return factor * out

        return call

    return make


def logits_peer(factor=1.0):
    def make(problem, cache):
        def call(rows):
            return factor * index_logits.reference(
                problem.q_fp8[rows],
                problem.weights[rows],
                cache,
                problem.block_table,
                problem.request_ids[rows],
                problem.num_keys[rows],
                problem.max_num_keys,
            )

        return call

    return make


def topk_peer(logits, num_keys, topk_pos):
    """In pages of one position the slots are the positions."""
    positions = torch.arange(logits.shape[1], dtype=torch.int32).unsqueeze(0)
    topk_select.reference(logits, num_keys, torch.zeros_like(num_keys), positions, 1, topk_pos)


def wrong_topk_peer(logits, num_keys, topk_pos):
    topk_peer(-logits, num_keys, topk_pos)


@pytest.fixture
def with_peers(small, monkeypatch):
    monkeypatch.setattr(peers, "refusals", lambda problem: {})
    for name in ("flash_attn3", "flash_mla", "flash_mla_prefill"):
        monkeypatch.setattr(peers, name, attention_peer())
    for name in ("deep_gemm_paged", "deep_gemm_prefill"):
        monkeypatch.setattr(peers, name, logits_peer())
    monkeypatch.setattr(peers, "TOPK_OPS", {"op": topk_peer})
    monkeypatch.setattr(peers, "top_k_per_row_prefill", lambda logits, begins, *rest: topk_peer(logits, *rest))
    monkeypatch.setattr(peers, "slots_of", lambda *args: topk_select.slots_of(*args, BLOCK_SIZE))


@pytest.mark.parametrize(("name", "num_peers"), list(zip(ROWS, (2, 3, 1, 1), strict=True)))
def test_with_peers_a_row_has_a_ratio(with_peers, name, num_peers):
    row = ROWS[name]()
    assert (row.ratio, row.wrong, row.skipped, len(row.peers)) == (1.5, [], {}, num_peers)
    assert max(row.differences.values()) < 1e-2


@pytest.mark.parametrize(
    ("name", "function", "peer"),
    [
        ("sparse decode", "flash_mla", attention_peer(1.1)),
        ("sparse prefill", "flash_mla_prefill", attention_peer(math.nan)),
        ("index decode", "deep_gemm_paged", logits_peer(1.1)),
        ("index prefill", "deep_gemm_prefill", logits_peer(1.1)),
    ],
)
def test_sides_that_differ_have_no_ratio(with_peers, monkeypatch, name, function, peer):
    monkeypatch.setattr(peers, function, peer)
    row = ROWS[name]()
    assert len(row.wrong) == 1
    assert "at most 0.02 is right" in row.wrong[0]
    assert row.ratio is None


def test_a_peer_that_fails_is_skipped(with_peers, monkeypatch):
    monkeypatch.setattr(peers, "flash_mla", attention_peer(error="no such\nhead count"))
    row = measurements.sparse_decode(16, 2)
    assert row.skipped == {"FlashMLA fp8": "RuntimeError: no such head count"}
    assert list(row.peers) == ["FA3 bf16"]


def test_a_peer_that_selects_wrongly_does_not_compete(with_peers, monkeypatch):
    monkeypatch.setattr(peers, "TOPK_OPS", {"op": topk_peer, "cooperative_topk": wrong_topk_peer})
    row = measurements.index_decode(2, 4096)
    assert list(row.peers) == ["DeepGEMM + op"]
    assert row.skipped == {"DeepGEMM + cooperative_topk": "2 of 2 rows are not the highest 2048"}


def test_a_peer_whose_slots_are_wrong_does_not_compete(with_peers, monkeypatch):
    monkeypatch.setattr(peers, "slots_of", lambda topk_pos, *_: topk_pos ^ 1)
    row = measurements.index_decode(2, 4096)
    assert row.skipped == {"DeepGEMM + op": "2 of 2 rows are not the highest 2048"}


def test_selection_alone(with_peers, monkeypatch):
    monkeypatch.setattr(peers, "TOPK_OPS", {"op": topk_peer, "cooperative_topk": wrong_topk_peer})
    row = measurements.select_decode(2, 4096)
    assert (row.ratio, row.wrong, list(row.peers)) == (1.5, [], ["op"])
    assert row.skipped == {"cooperative_topk": "2 of 2 rows are not the highest 2048"}


def block_peer(factor=1.0, num_others=0, latent_factor=1.0):
    """vLLM's side by our references; of each row so many keys are others than those that we select."""

    def in_tree(x, cache, index_cache, cache_format, topk, scale):
        assert (cache.dtype == torch.uint8) == (cache_format == "fp8_ds_mla")
        kernels = measurements.our_kernels(cache_format)
        ours = decode_block.ours(kernels, x, cache, index_cache, scale)
        latents = replace(x, k_pe=latent_factor * x.k_pe)
        prepare = decode_block.prepare(kernels, latents, cache, index_cache)

        def call():
            slots = ours().slots.clone()
            unused = [i for i in range(slots.max() + 2) if i not in slots]
            slots[:, :num_others] = torch.tensor(unused[:1]).expand(num_others)
            num_selected = torch.full((len(slots),), slots.shape[1], dtype=torch.int32)
            out, _ = kernels.sparse_mla(prepare()[0], cache, slots, num_selected, scale)
            return decode_block.Attended(factor * out, slots)

        return call

    return in_tree


@pytest.mark.parametrize(
    ("peer", "wrong"),
    [
        (block_peer(), None),
        (block_peer(num_others=30), None),  # of 2,048
        (block_peer(num_others=200), "selection vs"),
        (block_peer(factor=1.1), "attention vs"),
        (block_peer(factor=1.1, num_others=30), "attention vs"),
        (block_peer(latent_factor=2.0), "latents vs"),
    ],
)
def test_a_decode_steps_attention_as_a_whole(with_peers, monkeypatch, peer, wrong):
    monkeypatch.setattr(decode_block, "in_tree", peer)
    row = measurements.decode_block(4, 2, 2050)
    assert list(row.ours) == ["reference bf16", "reference fp8"]
    assert list(row.peers) == ["FA3 bf16, op", "FlashMLA fp8, op"]
    assert row.launches == dict.fromkeys([*row.ours, *row.peers], [("kernel", 2.0)] * 4)
    assert row.floor_us == pytest.approx(2 * (2050 * 132 + 2048 * 656) / 4e6)
    assert "floor 0.8: 40% of ours | launches: reference bf16 4, reference fp8 4, FA3 bf16, op 4" in row_text(row)
    assert row.ratio == (None if wrong else 1.5)
    assert [reason.startswith(wrong) for reason in row.wrong] == ([True, True] if wrong else [])


def test_without_peers_the_block_is_ours_alone(small):
    row = measurements.decode_block(4, 1, 100)
    assert (row.ratio, row.peers, len(row.ours), len(row.skipped)) == (None, {}, 2, 2)


def wrong_topk(logits, *rest):
    topk_select.reference(-logits, *rest)


def test_a_wrong_kernel_of_ours_does_not_pass(small, monkeypatch):
    our_kernels = measurements.our_kernels
    monkeypatch.setattr(
        measurements, "our_kernels", lambda *args: replace(our_kernels(*args), topk_select=wrong_topk)
    )
    assert "2 of 2 rows" in measurements.index_decode(2, 4096).wrong[0]
    wrong_mla = SimpleNamespace(
        names={"sparse_mla": "mine"}, sparse_mla=lambda q, *rest: (1.1 * sparse_mla.reference(q, *rest)[0], None)
    )
    monkeypatch.setattr(measurements, "our_kernels", lambda *args: wrong_mla)
    assert "mine bf16 vs reference" in measurements.sparse_decode(16, 2).wrong[0]


def test_peers_are_refused_with_the_reason_of_our_rows_for_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(dispatch, "is_installed", lambda module: False)
    reasons = peers.refusals(measurements.problem())
    assert set(reasons) == {"FA3", "FlashMLA", "DeepGEMM"}
    assert all("is not installed; vLLM's wheel for CUDA has it" in reason for reason in reasons.values())
    monkeypatch.setattr(dispatch, "is_installed", lambda module: module != "vllm._C_stable_libtorch")
    assert list(peers.refusals(measurements.problem())) == ["DeepGEMM"]
    monkeypatch.setattr(dispatch, "is_installed", lambda module: True)
    assert peers.refusals(measurements.problem()) == {}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("kernel_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(("wrong", "ratio"), [([], 2.0), (["it is"], 2.0), ([], 1.1)])
def test_the_report(script, monkeypatch, tmp_path, capsys, wrong, ratio):
    versions = {"versions": {"torch": "1"}, "device": {"name": "a GPU", "capability": "9.0"}}
    monkeypatch.setattr(script, "environment", lambda: versions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def measure(*point):
        if point == (128, 16):
            raise RuntimeError("out of memory")
        return replace(timed(1.0, ratio), point=str(point), wrong=wrong)

    lines = {
        name: replace(line, measure=measure) for name, line in script.LINES.items() if name.startswith("sparse-d")
    }
    monkeypatch.setattr(script, "LINES", lines)
    out = tmp_path / "kernels.json"
    assert script.main(["--out", str(out)]) == 1
    is_met = not wrong and ratio == 2.0
    assert script.main(["--out", str(out), "--only", "sparse-decode-16"]) == int(not is_met)
    text, values = capsys.readouterr().out, json.loads(out.read_text())
    assert "CUDA graph replay, median of 7, inputs rotated" in text
    assert "WRONG: RuntimeError: out of memory" in text
    assert values.keys() == {"versions", "device", "measured", "launch_times", "lines"}
    line = values["lines"]["sparse-decode-16"]
    assert [row["point"] for row in line["rows"]] == [f"(16, {batch})" for batch in (1, 4, 16, 64, 128, 256)]
    assert line["rows"][0]["us"] == {"ours": {"a": 1.0, "b": 2.0}, "peers": {"c": ratio, "d": 3 * ratio}}
    assert line["summary"]["met"] is is_met
    assert line["summary"]["goal"] == {"geometric_mean": 1.6, "minimum": None}


def test_every_quick_point_is_a_point(script):
    for line in script.LINES.values():
        assert set(line.quick) <= set(line.points)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
