"""Loading: nothing of a checkpoint is lost, and nothing is made up."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config

from engine.checkpoints import prompts
from engine.comparison import BFLOAT16_KL, mean_kl
from engine.harness import complete, engine
from engine.oracle import load_oracle
from vllm_dsv32.errors import CheckpointError
from vllm_dsv32.model.tensor_shapes import TensorShapes
from vllm_dsv32.model.weights import load_checkpoint
from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, make_config, make_weights, write_checkpoint

OPTIONS = TinyCheckpointOptions(num_hidden_layers=2, index_topk=64)
DRAFTS = {"method": "mtp", "num_speculative_tokens": 1}


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, *shape):
    return lambda weights: weights.update({name: torch.zeros(*shape, dtype=torch.bfloat16)})


DAMAGE = {
    "missing plain": (
        drop("model.layers.0.self_attn.indexer.k_norm.bias"),
        {},
        "lacks 1 tensors .*: model.layers.0.self_attn.indexer.k_norm.bias",
    ),
    "missing part of a fused parameter": (
        drop("model.layers.1.self_attn.kv_a_proj_with_mqa.weight"),
        {},
        "lacks 1 tensors .*: model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    ),
    "missing expert": (
        drop("model.layers.1.mlp.experts.5.up_proj.weight"),
        {},
        "lacks 1 tensors .*: model.layers.1.mlp.experts.5.up_proj.weight",
    ),
    "missing in the draft layer": (
        drop("model.layers.2.eh_proj.weight"),
        {"speculative_config": DRAFTS},
        "lacks 1 tensors .*: model.layers.2.eh_proj.weight",
    ),
    "unexpected": (
        put("model.layers.0.self_attn.q_proj.weight", 8, 8),
        {},
        r"unexpected tensor model.layers.0.self_attn.q_proj.weight \(8, 8\)",
    ),
    "a ninth expert of eight": (
        put("model.layers.1.mlp.experts.8.up_proj.weight", 128, 256),
        {},
        "unexpected tensor model.layers.1.mlp.experts.8.up_proj.weight",
    ),
    "a scale without quantisation": (
        put("model.layers.0.self_attn.o_proj.weight_scale_inv", 2, 4),
        {},
        "unexpected tensor model.layers.0.self_attn.o_proj.weight_scale_inv .*Check quantization_config",
    ),
    "too large, where a loader would narrow it": (
        put("model.layers.0.self_attn.kv_b_proj.weight", 2048, 512),
        {},
        r"misshapen tensor model.layers.0.self_attn.kv_b_proj.weight: config.json makes it \(1024, 512\)",
    ),
    "too small, where a loader would broadcast it": (
        put("model.layers.1.self_attn.indexer.wk.weight", 1, 256),
        {},
        r"misshapen tensor .*indexer.wk.weight: config.json makes it \(128, 256\), the checkpoint has \(1, 256\)",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "whole", OPTIONS)


@pytest.mark.parametrize(("damage", "options", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_tensor(whole, tmp_path, damage, options, words):
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(whole / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words), engine(tmp_path, dtype="bfloat16", **options):
        pass


def test_the_draft_layer_is_not_needed_without_drafts(tmp_path):
    write_checkpoint(tmp_path / "whole", OPTIONS)
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.2.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "whole" / "model.safetensors")
    with engine(tmp_path / "whole", dtype="bfloat16") as llm:
        assert len(complete(llm, prompts(5), 2)[0].generated) == 2


def block_fp8_runs_here() -> bool:
    """vLLM's block-fp8 layers need a GPU, or a CPU with AMX."""
    cpu = Path("/proc/cpuinfo")
    return torch.cuda.is_available() or (cpu.exists() and "amx_tile" in cpu.read_text())


@pytest.mark.skipif(not block_fp8_runs_here(), reason="vLLM's block-fp8 linear layers need AMX or a GPU")
def test_fp8_blocks_through_the_engine(tmp_path):
    """The published format against the same numbers in plain form."""
    blocks, plain = (
        write_checkpoint(tmp_path / kind, TinyCheckpointOptions(weight_format=kind, index_topk=64, dense_only=True))
        for kind in ("fp8", "fp8_dequantized")
    )
    with engine(blocks, dtype="bfloat16") as llm:
        completions = complete(llm, prompts(200, 65), 8)
    # Activations are quantised, too: ten times the divergence of bfloat16, a tenth of a wrong scale's.
    assert mean_kl(load_oracle(plain), completions) <= 10 * BFLOAT16_KL


class Recording(torch.nn.Module):
    """A module with the parameter names of a model, whose loaders note what they are given."""

    def __init__(self, config: dict, expert_map: torch.Tensor | None):
        super().__init__()
        self.taken: list[tuple] = []
        for name in parameter_names(config):
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, torch.nn.Module())
                module = getattr(module, step)
            module.expert_map = expert_map
            parameter = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._loader(name)
            module.register_parameter(leaf, parameter)

    def _loader(self, parameter: str):
        def load(_parameter, tensor, *shard, **expert):
            self.taken.append(
                (parameter, tuple(tensor.shape), shard, expert.get("shard_id"), expert.get("expert_id"))
            )

        return load


def parameter_names(config: dict) -> set[str]:
    """As vLLM names the parameters of a block-fp8 model of this configuration."""
    names = set()
    for name in make_weights(options_of(config)):
        name = re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)\.", ".fused_qkv_a_proj.", name)
        name = re.sub(r"\.experts\.\d+\.(gate|up)_proj\.", ".experts.routed_experts.w13_", name)
        name = re.sub(r"\.experts\.\d+\.down_proj\.", ".experts.routed_experts.w2_", name)
        names.add(re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name))
    return {name for name in names if not name.startswith("model.layers.2.")}


def options_of(config: dict) -> TinyCheckpointOptions:
    return TinyCheckpointOptions(num_hidden_layers=config["num_hidden_layers"], weight_format="fp8")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_tensor_of_the_fp8_format_reaches_its_place(num_ranks):
    """Names, shards and experts, with all experts here and with half of them on another rank."""
    options = TinyCheckpointOptions(num_hidden_layers=2, weight_format="fp8")
    config, weights = make_config(options), make_weights(options)
    hf_config = DeepseekV3Config(**config)
    here = torch.tensor([0, 1, 2, 3, -1, -1, -1, -1]) if num_ranks == 2 else None
    model = Recording(config, here)
    load_checkpoint(model, hf_config, weights.items(), lambda name: name, lambda layer: layer is None or layer < 2)
    expected = {
        name
        for name in weights
        if not name.startswith("model.layers.2.") and (here is None or not re.search(r"experts\.[4-7]\.", name))
    }
    assert len(model.taken) == len(expected)
    taken = {(parameter, shard_id or shard, expert) for parameter, _, shard, shard_id, expert in model.taken}
    assert len(taken) == len(expected)
    layer = "model.layers.1.mlp.experts.routed_experts"
    for shard, parameter in (("w1", "w13"), ("w3", "w13"), ("w2", "w2")):
        for kind in ("weight", "weight_scale_inv"):
            assert (f"{layer}.{parameter}_{kind}", shard, 3) in taken
    fused = "model.layers.0.self_attn.fused_qkv_a_proj.weight_scale_inv"
    assert {(fused, (0,), None), (fused, (1,), None)} <= taken


def test_weights_may_be_updated_one_by_one():
    options = TinyCheckpointOptions(num_hidden_layers=2, weight_format="fp8")
    model = Recording(make_config(options), None)
    name = "model.layers.0.mlp.down_proj.weight"
    load_checkpoint(
        model,
        DeepseekV3Config(**make_config(options)),
        [(name, make_weights(options)[name])],
        lambda name: name,
        lambda layer: True,
        partial=True,
    )
    assert [taken[0] for taken in model.taken] == [name]


def test_shapes_are_those_of_the_format():
    options = TinyCheckpointOptions(weight_format="fp8")
    shapes = TensorShapes(DeepseekV3Config(**make_config(options)))
    for name, tensor in make_weights(options).items():
        shapes.check(name, tensor)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            shapes.check(name, tensor[None])


def test_packed_formats_are_not_judged():
    config = SimpleNamespace(quantization_config={"quant_method": "awq"})
    TensorShapes(config).check("model.layers.0.mlp.down_proj.weight", torch.empty(3))
