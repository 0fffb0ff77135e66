import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, DeepseekV32ForCausalLM

from vllm_dsv32.checkpoint_tensors import checkpoint_tensors
from vllm_dsv32.errors import CheckpointError, ConfigError
from vllm_dsv32.tools.fp8_blocks import dequantize_blocks
from vllm_dsv32.tools.tiny_checkpoint import (
    TinyCheckpointOptions,
    WeightScales,
    make_config,
    make_weights,
    write_checkpoint,
)

SMALL = TinyCheckpointOptions(
    hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, index_n_heads=4
)
PUBLISHED_SIZES = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "index_n_heads": 64,
    "index_topk": 2048,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}


@pytest.fixture(scope="module")
def default_checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "default", TinyCheckpointOptions())


def test_published_sizes_give_the_published_tensors() -> None:
    config = make_config(TinyCheckpointOptions(config_overrides=PUBLISHED_SIZES))
    num_tensors = num_elements = 0
    for spec in checkpoint_tensors(config):
        num_tensors += 1 + spec.is_fp8
        num_elements += math.prod(spec.shape)
        num_elements += spec.is_fp8 * math.prod(-(-size // 128) for size in spec.shape)
    # As counted over the 163 files of deepseek-ai/DeepSeek-V3.2.
    assert num_tensors == 92_425
    assert num_elements == 685_396_921_376


def test_config_has_the_published_keys_and_constants() -> None:
    config = make_config(TinyCheckpointOptions(config_overrides=PUBLISHED_SIZES, weight_format="fp8"))
    published = PUBLISHED_SIZES | {
        "architectures": ["DeepseekV32ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "index_head_dim": 128,
        "initializer_range": 0.02,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v32",
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 128,
    }
    assert config == published


def test_default_checkpoint_is_small_and_whole(default_checkpoint: Path) -> None:
    assert {file.name for file in default_checkpoint.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in default_checkpoint.iterdir()) < 20e6
    config = json.loads((default_checkpoint / "config.json").read_text())
    assert config == make_config(TinyCheckpointOptions())
    weights = load_file(default_checkpoint / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        spec.name: spec.shape for spec in checkpoint_tensors(config)
    }
    assert weights["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert weights["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert weights["model.layers.3.eh_proj.weight"].shape == (256, 512)
    assert torch.equal(weights["model.layers.3.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(weights["model.layers.3.shared_head.head.weight"], weights["lm_head.weight"])


def test_transformers_loads_and_generates(default_checkpoint: Path) -> None:
    # Not AutoModelForCausalLM: a vLLM loaded in this process has bound the model's type to V3's configuration.
    model, info = DeepseekV32ForCausalLM.from_pretrained(
        default_checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith("model.layers.3.") for key in info["unexpected_keys"]), "only MTP is left out"
    prompt = AutoTokenizer.from_pretrained(default_checkpoint)("a prompt past top-k " * 5, return_tensors="pt")
    assert prompt.input_ids.shape[1] > model.config.index_topk
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert output.shape[1] == prompt.input_ids.shape[1] + 3
    logits = model(**prompt).logits
    assert torch.isfinite(logits).all()
    assert 0.5 < logits.std() < 2


def test_transformers_finds_the_class_by_itself(default_checkpoint: Path) -> None:
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    command = [sys.executable, "-c", code, str(default_checkpoint)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "DeepseekV32ForCausalLM\n"


def test_weights_depend_on_seed_and_name_only() -> None:
    plain = make_weights(SMALL)
    again = make_weights(SMALL)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    other = make_weights(replace(SMALL, seed=1))
    assert not any(torch.equal(plain[name], other[name]) for name in plain)
    reduced = make_weights(replace(SMALL, num_hidden_layers=1, num_nextn_predict_layers=0, yarn=False))
    assert reduced.keys() < plain.keys()
    assert all(torch.equal(plain[name], reduced[name]) for name in reduced)


def test_each_role_has_its_spread() -> None:
    weights = make_weights(TinyCheckpointOptions(weight_scales=WeightScales(o_proj=2.0)))
    prefix = "model.layers.1.self_attn"

    def gain(name: str) -> float:
        return float(weights[name].float().std()) * weights[name].shape[-1] ** 0.5

    assert gain(f"{prefix}.q_b_proj.weight") == pytest.approx(0.5, rel=0.05)
    assert gain(f"{prefix}.o_proj.weight") == pytest.approx(2.0, rel=0.05)
    assert gain(f"{prefix}.indexer.wq_b.weight") == pytest.approx(1.0, rel=0.05)
    assert weights["model.embed_tokens.weight"].float().std() == pytest.approx(1.0, rel=0.05)
    norm = weights["model.norm.weight"]
    assert norm.mean() == pytest.approx(1.0, abs=0.05)
    assert norm.std() == pytest.approx(0.1, rel=0.3)
    assert weights[f"{prefix}.indexer.k_norm.bias"].abs().max() > 0.1
    assert weights["model.layers.1.mlp.gate.e_score_correction_bias"].abs().max() > 0.05


def test_fp8_format() -> None:
    plain = make_weights(replace(SMALL, dtype="float32"))
    fp8 = make_weights(replace(SMALL, weight_format="fp8"))
    dequantized = make_weights(replace(SMALL, weight_format="fp8_dequantized"))
    config = make_config(replace(SMALL, weight_format="fp8"))
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    assert "quantization_config" not in make_config(replace(SMALL, weight_format="fp8_dequantized"))
    assert dequantized.keys() == plain.keys()
    quantised = {name for name, tensor in fp8.items() if tensor.dtype == torch.float8_e4m3fn}
    kept = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in plain.keys() - quantised}
    assert {name for name in kept if "norm" not in name} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "self_attn.indexer.weights_proj.weight",
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        "embed_tokens.weight",
        "eh_proj.weight",
        "shared_head.head.weight",
    }
    assert fp8.keys() == plain.keys() | {f"{name}_scale_inv" for name in quantised}
    for name in plain:
        if name in quantised:
            restored = dequantize_blocks(fp8[name], fp8[f"{name}_scale_inv"])
            error = (restored - plain[name]).norm() / plain[name].norm()
            assert error < 0.04, name
            assert torch.equal(dequantized[name].float(), restored), "the two formats are the same numbers"
        else:
            assert torch.equal(fp8[name], plain[name].to(fp8[name].dtype))


def test_options_reach_the_config() -> None:
    dense = make_config(replace(SMALL, dense_only=True))
    assert not any("experts" in spec.name for spec in checkpoint_tensors(dense))
    unscaled = make_config(replace(SMALL, yarn=False))
    assert "rope_scaling" not in unscaled
    assert unscaled["max_position_embeddings"] == 4096
    overridden = make_config(replace(SMALL, config_overrides={"num_attention_heads": 8, "ep_size": None}))
    assert (overridden["num_attention_heads"], overridden["num_key_value_heads"]) == (8, 8)
    assert "ep_size" not in overridden


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_routed_experts": 7}, "multiple of n_group, got 7 experts in 4 groups"),
        ({"n_routed_experts": 4}, "at least 2 experts"),
        ({"num_experts_per_tok": 5}, r"1\.\.4 .*got 5"),
        ({"topk_group": 5}, "at most n_group = 4, got 5"),
        ({"qk_rope_head_dim": 256}, "at most index_head_dim = 128, got 256"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be a whole number of at least 0, got -1"),
        ({"n_group": 0}, "n_group must be a whole number of at least 1, got 0"),
        (
            {"config_overrides": {"hidden_size": "256"}},
            "hidden_size must be a whole number of at least 1, got '256'",
        ),
        ({"config_overrides": {"vocab_size": 100}}, "320 tokens, got 100"),
        ({"config_overrides": {"hidden_size": None}}, "may not remove hidden_size"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_config(replace(SMALL, **changes))


def test_existing_checkpoint_is_kept_unless_asked(default_checkpoint: Path) -> None:
    before = (default_checkpoint / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        write_checkpoint(default_checkpoint, SMALL)
    assert (default_checkpoint / "config.json").read_bytes() == before
    write_checkpoint(default_checkpoint, TinyCheckpointOptions(), overwrite=True)
    assert (default_checkpoint / "config.json").read_bytes() == before
