"""recipes/memory.py against arithmetic done by hand; what vLLM takes for fp8 blocks on GPUs before Hopper."""

import pytest
from recipes.pages import load_script
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe.oracle import fp8 as experts
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

memory = load_script("memory")

FP8 = memory.FP8_BLOCK_BITS / 8
# Of one layer, in weights.
EXPERTS = 256 * 3 * 7168 * 2048
SHARED = 3 * 7168 * 2048
DENSE = 3 * 7168 * 18432
ON_EVERY_RANK = 7168 * (1536 + 512 + 64) + 7168 * 128 + 1536 * 64 * 128
BY_HEADS = 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
NORMS = 2 * 7168 + 1536 + 512 + 2 * 128


def by_hand(tp: int, dp: int) -> float:
    """Bytes a GPU, without the draft layer."""
    index_inputs = 2 * 7168 * 64 + 2 * 7168 * (128 + 64)  # the weights' projection; with that of keys, in one
    layer = FP8 * (ON_EVERY_RANK + BY_HEADS / tp) + 2 * 512 * 128 * 256 / tp + index_inputs + 4 * NORMS
    moe = FP8 * (EXPERTS / (tp * dp) + SHARED / tp) + 2 * 256 * 7168 + 4 * 256
    return 61 * layer + 58 * moe + 3 * FP8 * DENSE / tp + 2 * 2 * 129280 * 7168 / tp + 4 * 7168


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (8, 1), (1, 8), (4, 2)])
def test_weights_are_those_counted_by_hand(tp, dp):
    (stage,) = memory.stages(memory.Deployment(tensor_parallel=tp, data_parallel=dp))
    assert stage.weight_nbytes == pytest.approx(by_hand(tp, dp), rel=1e-9)
    assert stage.num_cached_layers == 61


def test_pipeline_stages_share_out_the_layers():
    held = memory.stages(memory.Deployment(tensor_parallel=8, pipeline_parallel=2, draft=True))
    assert sorted(stage.num_cached_layers for stage in held) == [31, 31]
    (whole,) = memory.stages(memory.Deployment(tensor_parallel=8, draft=True))
    # Only a draft layer beside the model's embedding shares it.
    embedding = 2 * 129280 * 7168 / 8
    assert sum(stage.weight_nbytes for stage in held) == pytest.approx(whole.weight_nbytes + embedding)


def test_the_draft_layer_is_one_more_layer():
    (without,), (with_draft,) = memory.stages(memory.Deployment()), memory.stages(memory.Deployment(draft=True))
    assert with_draft.num_cached_layers == 62
    # A layer with experts, three more norms, and eh_proj in bfloat16; embedding and head are the model's.
    layer = FP8 * (ON_EVERY_RANK + BY_HEADS + EXPERTS + SHARED) + 4 * (NORMS + 3 * 7168 + 256) + 2 * 256 * 7168
    layer += 2 * 512 * 128 * 256 + 2 * 7168 * 64 + 2 * 7168 * (128 + 64)
    assert with_draft.weight_nbytes - without.weight_nbytes == pytest.approx(layer + 2 * 2 * 7168 * 7168)


def test_experts_hold_the_tokens_of_all_replicas(capsys):
    """Of 7 x 2048 others, in 8 rows of 7168 bfloat16 in either workspace, and as they come and go."""
    assert memory.exchanged_nbytes(memory.Deployment(tensor_parallel=8)) == 0
    spread = memory.Deployment(data_parallel=8, num_batched_tokens=2048)
    assert memory.exchanged_nbytes(spread) == 7 * 2048 * (8 + 8 + 2) * 7168 * 2
    memory.main(["--gpu-gib", "139", "--data-parallel-size", "8", "--max-num-batched-tokens", "2048"])
    assert "experts     3.4 GiB a GPU, for tokens of other replicas" in capsys.readouterr().out


@pytest.mark.parametrize(("gpu_gib", "fits"), [(79, False), (139, True)])
def test_what_does_not_fit_is_said(capsys, gpu_gib, fits):
    status = memory.main(["--gpu-gib", str(gpu_gib), "--tensor-parallel-size", "8"])
    assert ("Does not fit." in capsys.readouterr().out) == (not fits)
    assert status == (0 if fits else 1)


@pytest.mark.parametrize(
    ("flag", "size", "message"),
    [
        ("--tensor-parallel-size", "3", "expected a divisor of the model's 128 heads, got 3"),
        ("--tensor-parallel-size", "0", "expected 1 or more, got 0"),
        ("--pipeline-parallel-size", "0", "expected 1 or more, got 0"),
        ("--data-parallel-size", "-1", "expected 1 or more, got -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(capsys, flag, size, message):
    with pytest.raises(SystemExit) as refused:
        memory.main(["--gpu-gib", "139", flag, size])
    assert refused.value.code == 2
    assert f"argument {flag}: {message}" in capsys.readouterr().err


@pytest.fixture
def pretend_gpu(monkeypatch):
    """vLLM's platform answers as a GPU of a capability below Hopper would."""

    def pretend(major: int, minor: int) -> None:
        capability, platform = DeviceCapability(major, minor), type(current_platform)
        answers = {
            "is_cuda": True,
            "is_cuda_alike": True,
            "is_cpu": False,
            "get_device_capability": capability,
            "supports_fp8": capability >= DeviceCapability(8, 9),
            "support_deep_gemm": False,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(platform, name, lambda *_, answer=answer, **__: answer)
        monkeypatch.setattr(platform, "_enum", PlatformEnum.CUDA)

    return pretend


@pytest.mark.parametrize(
    ("capability", "experts_backend"), [((8, 0), "MARLIN"), ((8, 9), "TRITON")], ids=["A100", "L40S"]
)
def test_what_vllm_takes_for_fp8_blocks(pretend_gpu, capability, experts_backend):
    """As a100.md and l40s_rtx_pro_6000.md say."""
    pretend_gpu(*capability)
    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CUDA]
    number = DeviceCapability(*capability).to_int()
    assert next(kernel.__name__ for kernel in kernels if kernel.is_supported(number)[0]) == (
        "MarlinFP8ScaledMMLinearKernel"
    )
    config = None  # is looked at for Hopper and Blackwell only
    order = experts._get_priority_backends(config, kFp8Static128BlockSym, kFp8Dynamic128Sym)
    taken = [
        backend.value
        for backend in order
        if backend
        not in (experts.Fp8MoeBackend.AITER, experts.Fp8MoeBackend.VLLM_CUTLASS)  # of ROCm; not for blocks
        and any(map(takes_fp8_blocks, experts.backend_to_kernel_cls(backend)))
    ]
    assert taken[0] == experts_backend


def takes_fp8_blocks(kernel: type) -> bool:
    return kernel._supports_current_device() and kernel._supports_quant_scheme(
        kFp8Static128BlockSym, kFp8Dynamic128Sym
    )
