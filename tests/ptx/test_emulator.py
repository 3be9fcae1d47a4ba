"""The emulator that runs compiled kernels on a CPU: what it computes, and what it refuses."""

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.commands import ROOT, environment
from tests.ptx.emulated_memory import EmulationError
from tests.ptx.emulator import ERROR, execute

#: Each lane's number, and the addresses of its elements of four bytes.
BEGINNING = """
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    shl.b32 %r3, %r2, 5;
    add.s32 %r4, %r3, %r1;
    mul.wide.u32 %rd3, %r4, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
"""
COPY = "ld.global.b32 %r5, [%rd4]; st.global.b32 [%rd5], %r5;"


def launch(
    body: str, input: Tensor, output: Tensor, grid: int | tuple[int, ...] = 1, shared: int = 512, warps: int = 1
) -> None:
    parameters = ".param .u64 kernel_param_0,\n.param .u64 kernel_param_1"
    text = f".visible .entry kernel(\n{parameters}\n)\n{{\n{BEGINNING}{body}\nret;\n}}\n"
    tensors = {"input": input, "output": output}
    execute(text, [input.data_ptr(), output.data_ptr()], tensors, ("output",), grid, shared, warps)


def result(body: str, input: Tensor, type: torch.dtype = torch.float32) -> Tensor:
    output = torch.zeros(len(input), dtype=type)
    launch(f"ld.global.b32 %r5, [%rd4]; {body} st.global.b32 [%rd5], %r9;", input, output, len(input) // 32)
    return output


def test_programs_go_their_own_ways() -> None:
    """Loops of as many turns as each program asks for."""
    body = """
        mov.b32 %r5, 0; mov.b32 %r6, 0;
    $L__BB0_1:
        setp.ge.s32 %p1, %r6, %r2;
        @%p1 bra $L__BB0_2;
        add.s32 %r5, %r5, 10;
        add.s32 %r6, %r6, 1;
        bra.uni $L__BB0_1;
    $L__BB0_2: // as many as there were turns
        st.global.b32 [%rd5], %r5;
    """
    output = torch.full((96,), -1, dtype=torch.int32)
    launch(body, torch.zeros(96), output, 3)
    assert output.tolist() == [0] * 32 + [10] * 32 + [20] * 32


def test_programs_have_axes_and_warps() -> None:
    body = """
        mov.u32 %r6, %ctaid.y; mov.u32 %r7, %nctaid.x; mad.lo.s32 %r8, %r6, %r7, %r2;
        mov.u32 %r9, %ntid.x; mad.lo.s32 %r10, %r8, %r9, %r1;
        mul.wide.u32 %rd6, %r10, 4; add.s64 %rd7, %rd2, %rd6;
        mad.lo.s32 %r11, %r6, 1000, %r1; mad.lo.s32 %r12, %r2, 100, %r11;
        st.global.b32 [%rd7], %r12;
    """
    output = torch.full((2 * 3 * 64,), -1, dtype=torch.int32)
    launch(body, torch.zeros(1), output, (2, 3), 0, 2)
    axes = (1000 * torch.arange(3)[:, None, None], 100 * torch.arange(2)[:, None], torch.arange(64))
    assert torch.equal(output.view(3, 2, 64), sum(axes).int())  # type: ignore[union-attr]
    with pytest.raises(EmulationError, match="a program's warps share memory"):
        launch(body, torch.zeros(1), output, (2, 3), 512, 2)


@pytest.mark.parametrize(
    ("body", "theirs"),
    [
        ("div.rn.f32 %r9, 0f40400000, %r5;", lambda x: (3 / x.double()).float()),
        ("cvt.s64.s32 %rd9, %r5; cvt.s64.s32 %rd8, %rd9; cvt.u32.u64 %r9, %rd8;", lambda x: x),
        ("fma.rn.f32 %r9, %r5, %r5, 0fBF800000;", lambda x: (x.double() * x.double() - 1).float()),
        ("rsqrt.approx.ftz.f32 %r9, %r5;", lambda x: torch.rsqrt(x.double()).float()),
        ("sqrt.approx.ftz.f32 %r9, %r5;", lambda x: torch.sqrt(x.double()).float()),
        ("ex2.approx.f32 %r9, %r5;", lambda x: torch.exp2(x.double()).float()),
        ("div.full.f32 %r9, 0f40400000, %r5;", lambda x: (3 / x.double()).float()),
        (
            "mov.b32 %r6, 7; mov.b64 %rd9, {%r6, %r5}; fma.rn.f32x2 %rd9, %rd9, %rd9, %rd9; mov.b64 {%r6, %r9}, %rd9;",
            lambda x: (x.double() * x.double() + x.double()).float(),
        ),
        (
            "mov.b32 %r6, 7; mov.b64 %rd9, {%r5, %r6}; add.f32x2 %rd9, %rd9, %rd9; mov.b64 {%r9, %r6}, %rd9;",
            lambda x: x + x,
        ),
        (
            "cvt.rn.f16.f32 %rs1, %r5; fma.rn.f32.f16 %r9, %rs1, %rs1, %r5;",
            lambda x: (x.half().double().square() + x.double()).float(),
        ),
        (
            # One and x against two and a half.
            "cvt.rn.bf16x2.f32 %r6, %r5, 0f3F800000; setp.ge.bf16x2 %p1|%p2, %r6, 1056980992;"
            "selp.f32 %r9, 0f40400000, 0f00000000, %p1; @%p2 add.f32 %r9, %r9, 0f3F800000;",
            lambda x: (x.bfloat16() >= 0.5).float(),
        ),
        (
            "cvt.rn.f16x2.f32 %r6, 0f3F800000, %r5; setp.nan.f16x2 %p1|%p2, %r6, 939540480;"
            "selp.f32 %r9, 0f40400000, 0f00000000, %p2; @%p1 add.f32 %r9, %r9, 0f3F800000;",
            lambda x: x.isnan().float(),
        ),
        (
            "mov.b32 %r6, -1; redux.sync.max.f32 %r9, %r5, %r6;",
            lambda x: x.nan_to_num(-torch.inf, torch.inf).view(-1, 32).amax(1, keepdim=True).expand(-1, 32).flatten(),
        ),
        (
            "mov.b32 %r6, -1; redux.sync.min.NaN.f32 %r9, %r5, %r6;",
            lambda x: x.view(-1, 32).amin(1, keepdim=True).expand(-1, 32).flatten(),
        ),
        ("cvt.rn.bf16.f32 %rs1, %r5; add.f32.bf16 %r9, %rs1, %r5;", lambda x: x.bfloat16().float() + x),
        ("max.f32 %r9, %r5, 0f3F800000;", lambda x: torch.fmax(x, torch.ones(()))),
        ("max.NaN.f32 %r9, %r5, 0f3F800000;", lambda x: torch.maximum(x, torch.ones(()))),
        ("setp.le.f32 %p1, %r5, 0f3F800000; selp.f32 %r9, 0f00000000, %r5, %p1;", lambda x: x.where(~(x <= 1), 0.0)),
        ("setp.gtu.f32 %p1, %r5, 0f3F800000; selp.f32 %r9, %r5, 0f00000000, %p1;", lambda x: x.where(~(x <= 1), 0.0)),
        ("{ .reg .b16 h; cvt.rn.bf16.f32 %rs1, %r5; cvt.f32.bf16 %r9, %rs1; }", lambda x: x.bfloat16().float()),
        ("cvt.rn.bf16x2.f32 %r6, %r5, 0f3F800000; and.b32 %r9, %r6, -65536;", lambda x: x.bfloat16().float()),
        (
            "cvt.rn.f16x2.f32 %r6, 0f3F800000, %r5; mov.b32 {%rs1, %rs2}, %r6; cvt.f32.f16 %r9, %rs1;",
            lambda x: x.half().float(),
        ),
        ("shfl.sync.idx.b32 %r9, %r5, 3, 31, -1;", lambda x: x.reshape(-1, 32)[:, 3:4].expand(-1, 32).reshape(-1)),
    ],
)
def test_floating_point(body: str, theirs: object) -> None:
    input = torch.tensor([0.0, -0.0, 1.0, 1.5, 3e38, 1e-40, 65519.0, float("inf"), -1.0, float("nan")]).repeat(32)
    input = torch.cat([input, torch.randn(320, generator=torch.Generator().manual_seed(0))])
    input = input[input.abs() > 2.0**-126] if ".ftz" in body else input
    input = input[: len(input) // 32 * 32]
    assert callable(theirs)
    ours, expected = result(body, input), theirs(input)
    assert torch.equal(ours.isnan(), expected.isnan())
    if "approx" in body or "full" in body:
        # Off by what it may be, not always in one direction, and both are rounded.
        allowed = ERROR + 2 * 2.0**-24
        torch.testing.assert_close(ours, expected, rtol=allowed, atol=0, equal_nan=True)
        assert (ours < expected).any()
        assert (ours > expected).any()
        assert torch.equal(ours.isinf(), expected.isinf())
        alike = input == 1.5
        assert alike.sum() > 1
        assert len(ours[alike].unique()) == 1
    else:
        assert torch.equal(ours.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def test_not_a_number_is_nvidia_s() -> None:
    input = torch.full((32,), -float("nan"))
    assert (result("add.f32 %r9, %r5, %r5;", input).view(torch.int32) == 0x7FFFFFFF).all()
    assert torch.equal(result("mov.b32 %r9, %r5;", input).view(torch.int32), input.view(torch.int32)), "bits are kept"


@pytest.mark.parametrize(
    ("body", "theirs"),
    [
        ("shr.s32 %r9, %r5, 3;", lambda x: x >> 3),
        ("shr.u32 %r9, %r5, 40;", lambda x: x * 0),
        ("bfe.s32 %r9, %r5, 4, 5;", lambda x: (x << 23) >> 27),
        ("mul.hi.u32 %r9, %r5, -2147483648;", lambda x: ((x.long() & 0xFFFFFFFF) >> 1).int()),
        (
            "cvt.u16.u32 %rs1, %r5; mul.hi.u16 %rs2, %rs1, 21846; cvt.u32.u16 %r9, %rs2;",
            lambda x: ((x.long() & 0xFFFF) * 21846 >> 16).int(),
        ),
        ("div.s32 %r9, %r5, -7;", lambda x: torch.div(x, -7, rounding_mode="trunc")),
        ("rem.s32 %r9, %r5, 7;", lambda x: torch.fmod(x, 7)),
        ("div.u32 %r9, %r5, 7;", lambda x: ((x.long() & 0xFFFFFFFF) // 7).int()),
        ("prmt.b32 %r9, %r5, 255, 0x8884U;", lambda x: torch.where((x & 128) > 0, -1, 255).int() | 255),
        (
            "mul.wide.s32 %rd9, %r5, -3; shr.s64 %rd9, %rd9, 1; cvt.u32.u64 %r9, %rd9;",
            lambda x: (x.long() * -3 >> 1).int(),
        ),
        (
            "mov.b32 %r6, -1; redux.sync.min.s32 %r9, %r5, %r6;",
            lambda x: x.reshape(-1, 32).min(1, keepdim=True).values.expand(-1, 32).reshape(-1),
        ),
        ("min.u32 %r9, %r5, 9;", lambda x: torch.where((x >= 0) & (x < 9), x, 9)),
    ],
)
def test_integers(body: str, theirs: object) -> None:
    some = [0, 1, -1, 8, 9, 127, 128, 2**31 - 1, -(2**31), 12345]
    input = torch.cat([torch.tensor(some), torch.arange(-150, 64 * 6 - 160)]).int()[:320]
    assert callable(theirs)
    assert torch.equal(result(body, input, torch.int32), theirs(input).int())


def test_lanes_go_their_own_ways_and_meet_again() -> None:
    body = """
        mov.b32 %r5, 1;
        setp.lt.s32 %p1, %r1, 4;
        @%p1 bra $L__BB0_1;
        add.s32 %r5, %r5, 10;
        bra.uni $L__BB0_2;
    $L__BB0_1:
        add.s32 %r5, %r5, 20;
    $L__BB0_2:
        bar.sync 0;
        st.global.b32 [%rd5], %r5;
    """
    output = torch.zeros(32, dtype=torch.int32)
    launch(body, torch.zeros(32), output)
    assert output.tolist() == [21] * 4 + [11] * 28


def test_a_lane_may_end_before_the_others() -> None:
    output = torch.full((32,), -1.0)
    launch("setp.lt.s32 %p1, %r1, 4; @%p1 ret; " + COPY, torch.ones(32), output)
    assert output.tolist() == [-1.0] * 4 + [1.0] * 28


def test_predicated_lanes_alone_write() -> None:
    output = torch.full((32,), -1.0)
    body = "setp.lt.s32 %p1, %r1, 4; @%p1 ld.global.b32 %r5, [%rd4]; @%p1 st.global.b32 [%rd5], %r5;"
    launch(body, torch.ones(4), output)
    assert output.tolist() == [1.0] * 4 + [-1.0] * 28


#: Lanes below 8 load the address of the output, as parameter 1, and the others that of the input.
CHOSEN = "setp.lt.s32 %p1, %r1, 8; mov.b32 %r6, kernel_param_0; mov.b32 %r7, kernel_param_1; "
CHOSEN += "selp.b32 %r8, %r7, %r6, %p1; ld.param.b64 %rd6, [%r8]; add.s64 %rd7, %rd6, %rd3; "


def test_lanes_choose_among_parameters_and_their_memory() -> None:
    input, output = torch.arange(32.0), -torch.ones(32)
    launch(
        CHOSEN + "ld.global.b32 %r9, [%rd7]; add.f32 %r9, %r9, 0f3F800000; st.global.b32 [%rd5], %r9;", input, output
    )
    assert output.tolist() == [0.0] * 8 + list(range(9, 33))
    with pytest.raises(EmulationError, match="writes to what it should only read"):
        launch(CHOSEN + "st.global.b32 [%rd7], %r1;", input, output)
    for elsewhere in ("[%r8+4]", "[%r8+4096]"):
        with pytest.raises(EmulationError, match="reads what is no parameter"):
            launch(CHOSEN.replace("[%r8]", elsewhere), input, output)


ASYNC = "shl.b32 %r6, %r1, 4; mul.wide.u32 %rd6, %r1, 16; add.s64 %rd7, %rd1, %rd6; mov.b32 %r7, 16; "
ASYNC += "cp.async.cg.shared.global [ %r6 + 0 ], [ %rd7 + 0 ], 0x10, %r7; "


def test_copies_arrive_when_they_are_waited_for() -> None:
    input, output = torch.arange(128.0), torch.zeros(32)
    loaded = "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r6]; st.global.b32 [%rd5], %r12;"
    done = ASYNC + "cp.async.commit_group; cp.async.wait_group 0; "
    launch(done + loaded, input, output)
    assert torch.equal(output, input[2::4])
    for missing in ("cp.async.wait_group 0; ", "cp.async.commit_group; "):
        with pytest.raises(EmulationError, match="before what is to be there is there"):
            launch(done.replace(missing, "") + loaded, input, torch.zeros(32))
    with pytest.raises(EmulationError, match="before what is to be there is there"):
        launch(done.replace("wait_group 0", "wait_group 1") + loaded, input, torch.zeros(32))
    # What other lanes have copied needs a barrier too.
    other = "xor.b32 %r6, %r6, 16; "
    with pytest.raises(EmulationError, match="before what is to be there is there"):
        launch(done + other + loaded, input, torch.zeros(32))
    launch(done + "bar.sync 0; " + other + loaded, input, output := torch.zeros(32))
    assert torch.equal(output, input[2::4].reshape(16, 2).flip(1).reshape(-1))
    nothing = ASYNC.replace("mov.b32 %r7, 16", "mov.b32 %r7, 0").replace("%rd1, %rd6", "%rd1, 0")
    launch(nothing + "cp.async.wait_all; " + loaded, input, output := torch.ones(32))
    assert not output.any(), "zeros where nothing is to be read"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (COPY.replace("[%rd4]", "[%rd4+4]"), "reads 4 bytes outside its arguments"),
        (COPY.replace("[%rd5]", "[%rd5+-4]"), "writes 4 bytes outside its arguments"),
        (COPY.replace("[%rd5]", "[%rd4]"), "writes to what it should only read"),
        (COPY.replace("[%rd5]", "[%rd2]"), "writes an element twice"),
        (COPY + COPY, "writes an element twice"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd4];", "not aligned"),
        ("setp.lt.s32 %p1, %r1, 4; @%p1 bra $L__BB0_2; bar.sync 0; $L__BB0_2: ", "lanes that are not at work"),
        ("setp.lt.s32 %p1, %r1, 4; @%p1 shfl.sync.idx.b32 %r9, %r1, 3, 31, -1;", "lanes that are not at work"),
        ("bra.uni $L__BB0_2; mov.b32 %r8, 1; $L__BB0_2: add.s32 %r9, %r8, 1;", "%r8 is read before it is written"),
        ("ld.shared.b32 %r9, [%r1];", "not aligned"),
        ("shl.b32 %r6, %r1, 2; ld.shared.b32 %r9, [%r6];", "before what is to be there is there"),
        ("shl.b32 %r6, %r1, 6; st.shared.b32 [%r6], %r1;", "shared memory is left"),
        ("wgmma.fence.sync.aligned;", "unknown instruction"),
        ("add.s64 %rd9, %rd1, %r1;", "%r1 is not of 64 bits"),
    ],
)
def test_what_a_gpu_would_not_do_is_refused(body: str, said: str) -> None:
    with pytest.raises(EmulationError, match=said):
        launch(body, torch.ones(32), torch.zeros(32))


@pytest.mark.parametrize(
    ("target", "half_types"),
    [
        ("sm_90", "outside"),
        pytest.param("sm_90", "whole", marks=pytest.mark.slow),
        pytest.param("sm_80", "not work", marks=pytest.mark.slow),
        pytest.param("sm_100", "not work", marks=pytest.mark.slow),
    ],
)
def test_what_the_kernels_are_compiled_to_computes_the_same(target: str, half_types: str) -> None:
    """The paper's chain in bfloat16 by vectors, and windows in a loop. All tests of the file take a quarter of an hour.

    Compiling a chain takes 20 s, so ``make test`` has only one: two towers, with windows that reach out of the image.
    """
    some = f"(half_types_take and bfloat16 and {half_types}) or (large_windows and 64)"
    if half_types == "not work":
        # Dilated windows: only the emulator notices a load beyond the last image whose values are not used.
        some += " or (largest_may and float32)"
    passed = run_compiled("tests/kernels/test_triton_stage.py", some, target)
    assert passed == (5 if half_types == "not work" else 2)


def run_compiled(file: str, some: str, target: str) -> int:
    """The number of tests of a file that pass where kernels run as code compiled for a target."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", some]
    done = subprocess.run(
        tests, capture_output=True, text=True, cwd=ROOT, env=environment(KERNELS_TEST=f"ptx:{target}")
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


@pytest.mark.parametrize(
    ("target", "some", "least"),
    [
        ("sm_90", "(one_pass_bias_and_relu and one-torch and float32) or (in_one_launch and 2 and not 12)", 2),
        *(
            pytest.param(target, "one_pass and not compile", 77, marks=pytest.mark.slow)
            for target in ("sm_80", "sm_90", "sm_100")
        ),
    ],
)
def test_what_a_step_s_other_kernels_are_compiled_to_computes_the_same(target: str, some: str, least: int) -> None:
    """Input, bias and ReLU as they are launched; loss, update and bias and ReLU's backward compiled for one warp."""
    assert run_compiled("tests/kernels/test_one_pass.py", some, target) >= least
