"""Every Triton kernel compiles for every architecture that it is offered on, and fits; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.ptx_rules import negated_extrema, waits, waits_first

SHARED_NBYTES = {
    "8.0": 163 << 10,
    "8.6": 99 << 10,
    "8.9": 99 << 10,
    "9.0": 227 << 10,
    "10.0": 227 << 10,
    "12.0": 99 << 10,
}
"""What a block may use of shared memory, by compute capability (CUDA programming guide)."""

MAX_STACK_NBYTES = 128
"""Of a thread: what does not fit into its registers."""

SPILLING = {
    "sparse_mla, 128 heads, torch.bfloat16, fp8=False, split=True": 304,
    "sparse_mla, 128 heads, torch.bfloat16, fp8=True, split=True": 544,
    "sparse_mla_fp8_wide_kernel, 128 heads, split=False": 192,
    "sparse_mla_fp8_wide_kernel, 128 heads, split=True": 184,
    "topk_select 2 parts, 133 rows": 152,
}
"""What may spill more on SM 90: an H200 was faster than with tiles of 32 heads, more registers, or in Triton."""


def compile_for(capability: str, *sample: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), capability, *sample]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


# All specialisations for six architectures take five minutes; what differs between these is in the samples.
@pytest.mark.parametrize(
    ("capability", "sample"),
    [("9.0", []), ("8.0", ["0"]), ("8.6", ["1"]), ("8.9", ["2"]), ("10.0", ["3"]), ("12.0", ["4"])],
)
def test_every_kernel_compiles_and_fits(capability, sample):
    report = compile_for(capability, *sample)
    assert {row["kernel"] for row in report["compiled"]} == set(report["kernels"])
    for row in report["compiled"]:
        assert row["shared_nbytes"] <= SHARED_NBYTES[capability], row
        spills = SPILLING if capability == "9.0" else {}
        assert row["stack_nbytes"] <= spills.get(row["name"], MAX_STACK_NBYTES), row
        assert row["num_negated_extrema"] == 0, row
        # From SM 90 on, launches begin early: then every kernel has to wait, and otherwise none knows how.
        begins_early = capability in ("9.0", "10.0", "12.0")
        assert (row["waits"], row["waits_first"]) == (begins_early, begins_early), row


def test_negated_extrema_are_seen():
    ptx = """.visible .entry kernel(
    neg.s32 	%r1, %r5;
    max.s32 	%r2, %r1, %r3;
    max.s32 	%r4, %r3, -5;
.func other(
    max.s32 	%r2, %r1, %r3;
    min.s32 	%r6, %r3, %r1;
    neg.s32 	%r9, %r1;
$L__BB0_2:
    max.s32 	%r2, %r9, %r3;
    add.s32 	%r9, %r9, 1;
    neg.s32 	%r7, %r1;
    min.s32 	%r8, %r3, %r7;
"""
    assert negated_extrema(ptx) == 2


_WAITING = """.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0
)
.reqntid 128
{
	.reg .b32 	%r<9>;
$L__func_begin0:
// %bb.0:
	ld.param.b64 	%rd1, [_kernel_param_0];
	// begin inline asm
	griddepcontrol.launch_dependents; // dummy %r1
	// end inline asm
	{HERE}
	griddepcontrol.wait; // dummy %r2
	ld.global.b32 	%r3, [%rd1];
	ret;
}
"""


@pytest.mark.parametrize(
    ("here", "first"),
    [
        ("mov.u32 	%r4, %tid.x;", True),
        ("@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 32;", True),
        ("ld.global.b32 	%r4, [%rd1];", False),
        ("@%p1 ld.global.nc.b32 { %r4 }, [ %rd1 + 0 ];", False),
        ("cp.async.cg.shared.global [ %r4 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;", False),
        ("st.global.b32 	[%rd1], %r4;", False),
        ("@%p1 bra 	$L__BB0_2;", False),
        ("@%p1 ret;", False),
        ("$L__BB0_1:", False),
        ("@%p1 griddepcontrol.wait;", False),
    ],
)
def test_what_comes_before_the_wait_is_seen(here, first):
    ptx = _WAITING.replace("{HERE}", here)
    assert waits(ptx)
    assert waits_first(ptx) == first


def test_a_kernel_that_never_waits_is_seen():
    without = _WAITING.replace("griddepcontrol.wait;", "").replace("{HERE}", "")
    assert waits(without)
    assert not waits_first(without)
    assert not waits_first(_WAITING.replace("{HERE}", "") + without)
    assert not waits_first("")
