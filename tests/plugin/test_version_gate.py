"""Under a vLLM that the plugin was not tested with, DeepSeek-V3.2 is refused and nothing else changes."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from plugin.test_registration import run
from vllm_dsv32 import compat
from vllm_dsv32.tools.tiny_checkpoint import TinyCheckpointOptions, write_checkpoint

# The version comes from a generated module; what stands in its place is all that makes this vLLM "newer".
OTHER_VERSION = """
    import json, sys, types
    sys.modules["vllm._version"] = types.SimpleNamespace(__version__={version!r}, __version_tuple__=(0, 99, 0))
    from vllm import LLM, SamplingParams
    def first_token(path):
        llm = LLM(path, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=128)
        return llm.generate(
            [dict(prompt_token_ids=[5, 6, 7])], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False
        )[0].outputs[0].token_ids[0]
    other = first_token({other!r})
    try:
        first_token({path!r})
        outcome = "served"
    except Exception as error:
        outcome = f"{{type(error).__name__}}: {{error}}"
    from vllm.tool_parsers import ToolParserManager
    from vllm.tokenizers.registry import TokenizerRegistry
    name = "deepseek_v32"
    owners = [ToolParserManager.get_tool_parser(name), TokenizerRegistry.load_tokenizer_cls(name)]
    print(json.dumps(dict(other=other, outcome=outcome, owners=[cls.__module__ for cls in owners])))
"""


@pytest.fixture(scope="module")
def under_another_version(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder / "v32", TinyCheckpointOptions(dense_only=True, num_hidden_layers=1))
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    code = OTHER_VERSION.format(version="0.99.0+cpu", other=str(folder / "llama"), path=str(folder / "v32"))
    return run(code)


def test_other_models_still_serve(under_another_version):
    assert isinstance(under_another_version["other"], int)


def test_v32_is_refused_and_does_not_fall_through(under_another_version):
    outcome = under_another_version["outcome"]
    assert outcome.startswith("UnsupportedVllmError: vllm-dsv32 was tested with vLLM"), json.dumps(outcome)
    assert "found 0.99.0+cpu" in outcome
    assert "uninstall vllm-dsv32" in outcome


def test_the_text_side_is_left_to_vllm(under_another_version):
    assert all(module.startswith("vllm.") for module in under_another_version["owners"])


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.32.1", True),
        ("0.32.0rc1", False),
        ("0.31.9", False),
        ("0.33.0", True),
        ("0.34.0", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_the_range(monkeypatch, version, supported):
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    assert (compat.unsupported_reason() is None) == supported
