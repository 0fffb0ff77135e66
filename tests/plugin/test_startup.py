"""Which of vLLM's defaults are changed, and that a user's own choice stands."""

from types import SimpleNamespace

import pytest

from vllm_dsv32 import startup


@pytest.fixture(autouse=True)
def no_choice_made(monkeypatch):
    monkeypatch.delenv("VLLM_DEEP_GEMM_WARMUP", raising=False)
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)


def config(linear_backend="auto", per_quant=None):
    return SimpleNamespace(
        kernel_config=SimpleNamespace(linear_backend=linear_backend, linear_backend_per_quant=per_quant)
    )


def settings(vllm_config, capability):
    return [change.setting for change in startup.changes(vllm_config.kernel_config, capability)]


WARMUP, SAMPLER, LINEAR = "VLLM_DEEP_GEMM_WARMUP", "VLLM_USE_FLASHINFER_SAMPLER", "--linear-backend"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, []),
        ((8, 0), [WARMUP, SAMPLER]),
        ((8, 9), [WARMUP, SAMPLER]),
        ((9, 0), [WARMUP, SAMPLER, LINEAR]),
        ((10, 0), [WARMUP, SAMPLER, LINEAR]),
        ((12, 0), [WARMUP, SAMPLER]),
    ],
)
def test_what_each_gpu_gets(capability, expected):
    assert settings(config(), capability) == expected


def test_a_choice_of_the_user_stands(monkeypatch):
    assert LINEAR not in settings(config(linear_backend="deep_gemm"), (9, 0))
    assert LINEAR not in settings(config(per_quant={"fp8_block_w8a8": "triton"}), (9, 0))
    assert LINEAR in settings(config(per_quant={"nvfp4": "marlin"}), (9, 0))
    for name in (WARMUP, SAMPLER):
        monkeypatch.setenv(name, "")
        assert name not in settings(config(), (9, 0))


def test_a_precompiled_sampler_is_used(monkeypatch):
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: object())
    assert SAMPLER not in settings(config(), (9, 0))


def test_changes_are_applied(monkeypatch):
    monkeypatch.setattr(startup, "changes", lambda *_: [startup._WARMUP, startup._SAMPLER, startup._LINEAR])
    monkeypatch.setenv(WARMUP, "x")  # so that monkeypatch restores both
    monkeypatch.setenv(SAMPLER, "x")
    vllm_config = config(per_quant={"nvfp4": "marlin"})
    startup.shorten_startup(vllm_config)
    assert (startup.os.environ[WARMUP], startup.os.environ[SAMPLER]) == ("skip", "0")
    assert vllm_config.kernel_config.linear_backend_per_quant == {"nvfp4": "marlin", "fp8_block_w8a8": "cutlass"}


def test_vllm_knows_the_scheme():
    """A name that it does not know would be ignored in silence."""
    import inspect

    from vllm.model_executor.kernels import linear

    assert f'"{startup._FP8_BLOCK}"' in inspect.getsource(linear)
