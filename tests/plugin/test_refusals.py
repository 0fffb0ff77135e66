"""What the plugin does not serve is refused before a layer is built, with a reason and a way out."""

import json
from pathlib import Path

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from vllm_dsv32.config import ModelDims, normalise_kv_cache_dtype
from vllm_dsv32.errors import ConfigError
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, make_config


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a configuration; no weights are read here."""

    def write(**changes) -> Path:
        config = make_config(TinyCheckpointOptions()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def engine_config(path: Path, **options):
    defaults = {"skip_tokenizer_init": True, "max_model_len": 512, "dtype": "bfloat16"}
    return EngineArgs(model=str(path), **(defaults | options)).create_engine_config()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2 is not served .* use auto .* or fp8"),
        (
            {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
            "--kv-cache-dtype bfloat16 is not served with --dtype float32",
        ),
        ({"attention_backend": "TRITON_MLA"}, "--attention-backend TRITON_MLA is not served.*Drop the flag"),
        ({"dtype": "float16"}, "overflow float16"),
        (
            {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config is not served.*Drop the flag",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size is not served.*Drop the flag"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers is not served.*Drop the flag"),
        ({"attention_config": {"indexer_kv_dtype": "mxfp4"}}, "--attention-config.indexer_kv_dtype is not served"),
        ({"attention_config": {"hisparse_config": {}}}, "--attention-config.hisparse_config is not served"),
        (
            {"attention_config": {"backend_per_kind": {"mla_attention": "TRITON_MLA"}}},
            "--attention-config.backend_per_kind is not served",
        ),
        ({"additional_config": {"vllm_dsv32": {"kernel": {}}}}, "with the keys kernels and shared_selection_from"),
        (
            {"additional_config": {"vllm_dsv32": {"shared_selection_from": "8192"}}},
            "expected a number of tokens times keys, or null for never, got '8192'",
        ),
        ({"additional_config": {"vllm_dsv32": {"kernels": ["triton"]}}}, "a map from operation to the name"),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "decode_context_parallel_size=2 is not served.*Use tensor, pipeline",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value),
)
def test_settings(checkpoint, options, words):
    with pytest.raises(Exception, match=words):
        engine_config(checkpoint(), **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index_n_heads": None}, "config.json has no index_n_heads"),
        ({"index_topk_freq": 4}, "index_topk_freq=4 is not served"),
        ({"index_topk_pattern": "FSSF"}, "index_topk_pattern='FSSF' is not served"),
    ],
)
def test_checkpoints(checkpoint, changes, words):
    with pytest.raises(Exception, match=words):
        engine_config(checkpoint(**changes))


@pytest.mark.parametrize(
    ("asked", "dtype", "given"),
    [
        ("auto", torch.bfloat16, "auto"),
        ("auto", torch.float32, "auto"),
        ("bfloat16", torch.bfloat16, "auto"),
        ("fp8", torch.bfloat16, "fp8_ds_mla"),
        ("fp8_e4m3", torch.bfloat16, "fp8_ds_mla"),
        ("fp8_ds_mla", torch.float32, "fp8_ds_mla"),
    ],
)
def test_cache_formats(asked, dtype, given):
    assert normalise_kv_cache_dtype(asked, dtype) == given


def test_the_cache_dtype_is_fixed_before_layers_are_built(checkpoint):
    assert engine_config(checkpoint(), kv_cache_dtype="fp8").cache_config.cache_dtype == "fp8_ds_mla"


def test_dimensions_come_from_the_configuration(checkpoint):
    dims = ModelDims.from_hf_config(engine_config(checkpoint()).model_config.hf_config)
    assert (dims.topk, dims.num_heads, dims.q_lora_rank) == (64, 4, 128)
    assert dims.index_rope_layout is RopeLayout.NEOX
    assert dims.rope_parameters["rope_type"] == "deepseek_yarn"
    # YaRN, factor 40, mscale_all_dim 1: 192^-0.5 times (0.1 ln 40 + 1)^2.
    assert dims.softmax_scale == pytest.approx(192**-0.5 * 1.3688879454**2)


def test_the_other_rope_layout_is_an_option_of_the_configuration(checkpoint):
    config = engine_config(checkpoint(indexer_rope_interleave=True)).model_config.hf_config
    assert ModelDims.from_hf_config(config).index_rope_layout is RopeLayout.INTERLEAVED


def test_without_yarn_the_scale_is_plain(checkpoint):
    config = engine_config(checkpoint(rope_scaling=None)).model_config.hf_config
    assert ModelDims.from_hf_config(config).softmax_scale == pytest.approx(192**-0.5)


def test_missing_routing_keys_are_filled_in(checkpoint):
    config = engine_config(checkpoint(scoring_func=None, topk_method=None)).model_config.hf_config
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")


def test_errors_are_of_our_tree(checkpoint):
    config = engine_config(checkpoint()).model_config.hf_config
    config.q_lora_rank = None
    with pytest.raises(ConfigError):
        ModelDims.from_hf_config(config)
