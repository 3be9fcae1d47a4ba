"""Compile the kernels ahead of time, for GPUs that need not be present: ``python -m kernels.aot``.

For each target, this compiles every kernel of the paper's stages in the configurations that are launched for them, and
the other kernels of a training step. It prints and writes as JSON: registers, the warps they leave room for, bytes of
local memory (spills) and shared memory, the widths of accesses to global memory, special-function and all instructions
per element that a thread computes (of the output forward, of the input backward), and the minimum memory traffic.
"""

import argparse
import collections
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import private
from .arguments import Normalization, Pooling
from .gpu import bias_relu, config, loss, ops, update
from .gpu import input as input_
from .gpu.forward import forward_kernel
from .gpu.launch import Launch, backward_launch, forward_launch

#: The AMD targets are MI300 and MI350; the kernels have not run on either.
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
BATCH = 128
PAPER_NORMALIZATION = Normalization(5, 5e-4, 0.75, 2.0, 1)
PAPER_POOLING = Pooling((3, 3), (2, 2), (0, 0), (1, 1), False)


class Case(NamedTuple):
    """A configuration that the paper's network launches; ``activation`` is whether bias and ReLU come first."""

    name: str
    shape: tuple[int, int, int, int]
    normalization: Normalization | None
    pooling: Pooling | None
    activation: bool = True


#: One tower's maps after conv1, conv2 and conv5; normalization alone is for other networks.
CASES = (
    Case("stage 1", (BATCH, 48, 55, 55), PAPER_NORMALIZATION, PAPER_POOLING),
    Case("stage 2", (BATCH, 128, 27, 27), PAPER_NORMALIZATION, PAPER_POOLING),
    Case("stage 5", (BATCH, 128, 13, 13), None, PAPER_POOLING),
    Case("relu and normalization", (BATCH, 96, 55, 55), PAPER_NORMALIZATION, None),
)

OTHERS = ("input, pixels", "input, blocks", "update", "loss", "bias and ReLU", "bias and ReLU, backward")
#: Elements of the paper's weights, conv1 to fc8, as one launch updates them in bfloat16: conv2, conv4 and conv5 by
#: tower. With conv1 and conv3 by tower too there are thirteen.
PAPER_WEIGHTS = (34848, *2 * [153600], 884736, *2 * [331776], *2 * [221184], 37748736, 16777216, 4096000)


@contextlib.contextmanager
def launched_for(target: str) -> Iterator[None]:
    """Inside a ``with`` block, launches are configured for the target: its lanes per warp, and the signs of its NaN."""
    before = config.AMD, config.LANES
    config.AMD = not target.startswith("sm_")
    config.LANES = 64 if config.AMD else 32
    try:
        yield
    finally:
        config.AMD, config.LANES = before


def launches(case: Case, dtype: torch.dtype, format: torch.memory_format) -> Iterator[tuple[str, Launch, int]]:
    """(mode, launch, minimum bytes moved) for a case's kernels, made by the launcher itself from meta tensors."""
    input = torch.empty(case.shape, dtype=dtype, device="meta", memory_format=format)
    bias = torch.empty(case.shape[1], device="meta") if case.activation else None
    parts = (case.activation, case.normalization, case.pooling)
    output, offsets = ops.outputs(input, case.pooling, True)
    nothing = output.new_empty(0, dtype=torch.uint8)
    size = input.numel() * input.element_size()
    out_size = output.numel() * output.element_size()
    saved = offsets.numel() * offsets.element_size()
    yield "forward", forward_launch(input, bias, *parts, True, output, offsets), size + out_size + saved
    yield "inference", forward_launch(input, bias, *parts, False, output, nothing), size + out_size
    masked = case.normalization is None and case.activation
    launch, _ = backward_launch(
        torch.empty_like(output),
        input if case.normalization else None,
        bias if case.normalization else None,
        output if masked else None,
        offsets if case.pooling else None,
        *parts,
        torch.empty_like(input),
        case.activation,
    )
    yield "backward", launch, (2 if case.normalization else 1) * size + (2 if masked else 1) * out_size + saved


def source(launch: Launch, aligned: bool = True) -> Any:
    """The source that Triton compiles for a launch; see :func:`specialized`."""
    return specialized(launch.kernel, {**launch.arguments, "C": launch.config}, aligned)


def specialized(kernel: Any, arguments: dict[str, Any], aligned: bool = True) -> Any:
    """The source that Triton compiles for a call, specialized on integers of 1 and multiples of 16 as in a launch.

    Args:
        kernel: the kernel.
        arguments: by name.
        aligned: whether to specialize on tensors that begin at multiples of 16 bytes, as meta tensors do.
    """
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, place: tuple[int, ...], specialize: bool) -> Any:
        """The type of the argument at ``place``; a tuple of types for a tuple."""
        if isinstance(value, tuple):
            # Triton specializes on the elements of a tuple even if it does not on the tuple.
            kinds = (kind(each, (*place, index), True) for index, each in enumerate(value))
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, Tensor):
            if aligned and value.data_ptr() % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
            return "*" + _POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if specialize and value == 1:
            constants[place] = 1
            return "constexpr"
        if specialize and value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for place, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", arguments[name]
        else:
            signature[name] = kind(arguments[name], (place,), not parameter.do_not_specialize)
    return private.found("triton.compiler:ASTSource")(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    )


_POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _target(name: str) -> Any:
    target = private.found("triton.backends.compiler:GPUTarget")
    if name.startswith("sm_"):
        return target("cuda", int(name.removeprefix("sm_")), 32)
    return target("hip", name, 64)


def _tool(name: str) -> str:
    """A program that comes with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cuobjdump(compiled: Any, option: str) -> str:
    """The output of an NVIDIA tool for machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        return subprocess.run([_tool("cuobjdump"), option, file], capture_output=True, text=True, check=True).stdout


def warps(registers: int) -> int:
    """One-warp programs that fit on an NVIDIA scheduler at once, limited only by registers per thread.

    A scheduler has 16384 registers and allocates them to a warp's 32 lanes in steps of eight; a multiprocessor holds 32
    programs on its four schedulers (compute capability 8.0, 9.0 and 10.0).
    """
    return min(8, 16384 // (32 * 8 * -(-registers // 8)))


def _nvidia(compiled: Any) -> dict[str, Any]:
    """Statistics of the machine code from NVIDIA's tools."""
    usage, code = _cuobjdump(compiled, "--dump-resource-usage"), _cuobjdump(compiled, "-sass")
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", code)
    # After the last EXIT there are a branch to itself and NOPs, which are padding.
    placed = [(int(address, 16), name, operands) for address, name, operands in lines if name != "NOP"]
    instructions = [name for _, name, _ in placed]
    loop: list[str] = []
    for address, name, operands in placed:
        if (
            name.split(".")[0] == "BRA"
            and (target := re.search(r"0x([0-9a-f]+)", operands))
            and int(target[1], 16) < address
        ):
            inside = [other for place, other, _ in placed if int(target[1], 16) <= place <= address]
            loop = max(loop, inside, key=len)
    accesses: collections.Counter[str] = collections.Counter()
    for name in instructions:
        parts = name.split(".")
        if parts[0] in ("LDG", "LDGSTS", "STG"):
            width = next((int(part) for part in parts if part in ("64", "128")), None)
            if width is None:
                width = next((int(part[1:]) for part in parts if part in ("U8", "S8", "U16", "S16")), 32)
            accesses[f"{'store' if parts[0] == 'STG' else 'load'} {width // 8} bytes"] += 1
    return {
        "registers": numbers["REG"],
        "warps": warps(numbers["REG"]),
        "local_bytes": numbers["LOCAL"] + numbers["STACK"],
        "local_accesses": sum(name.split(".")[0] in ("LDL", "STL") for name in instructions),
        "shared_bytes": compiled.metadata.shared,
        "accesses": dict(sorted(accesses.items())),
        "special_functions": sum(name.startswith("MUFU") for name in instructions),
        "instructions": len(instructions),
        "loop_instructions": len(loop),
        "loop_special_functions": sum(name.startswith("MUFU") for name in loop),
    }


def _amd(compiled: Any) -> dict[str, Any]:
    """Statistics of AMD's machine code from the assembler."""
    text = compiled.asm["amdgcn"]
    numbers = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    instructions = re.findall(r"^\t([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|scratch_\w+)", text, re.MULTILINE)
    widths = {"": 4, "ubyte": 1, "ushort": 2, "short": 2, "byte": 1, "dword": 4, "dwordx2": 8, "dwordx4": 16}
    accesses: collections.Counter[str] = collections.Counter()
    for name in instructions:
        if match := re.match(r"(?:global|buffer)_(load|store)_(\w+?)(?:_d16\w*)?$", name):
            accesses[f"{match[1]} {widths.get(match[2], 4)} bytes"] += 1
    special = ("v_rsq", "v_sqrt", "v_rcp", "v_exp", "v_log")
    return {
        "registers": numbers["vgpr_count"],
        "warps": None,
        "local_bytes": 4 * numbers["vgpr_spill_count"],
        "local_accesses": sum(name.startswith("scratch_") for name in instructions),
        "shared_bytes": compiled.metadata.shared,
        "accesses": dict(sorted(accesses.items())),
        "special_functions": sum(name.startswith(special) for name in instructions),
        "instructions": len(instructions),
        "loop_instructions": 0,
        "loop_special_functions": 0,
    }


def _read(compiled: Any) -> dict[str, Any]:
    return _nvidia(compiled) if "cubin" in compiled.asm else _amd(compiled)


def _compile(launch: Launch, target: str, aligned: bool) -> Any:
    arch = _target(target)
    capability = arch.arch // 10 if arch.backend == "cuda" else None
    return triton.compile(source(launch, aligned), target=arch, options=launch.options(capability))


def unaligned(launch: Launch) -> Launch:
    """The launch for tensors that do not begin at multiples of 16 bytes."""
    return launch._replace(config=launch.config._replace(words=0, offset_words=0))


def build(launch: Launch, target: str, aligned: bool = True) -> dict[str, Any]:
    """Compile a launch for a target and read its machine code.

    Returns:
        registers per thread, the resulting warps per scheduler (None for AMD), bytes of local and shared memory,
        accesses to global memory by width, special functions and all instructions in the code, those of the longest
        loop, and the elements that a thread computes per iteration of it (of the output forward, of the input
        backward).
    """
    if not aligned:
        launch = unaligned(launch)
    c = launch.config
    found = _read(_compile(launch, target, aligned))
    return {**found, "elements_a_step": c.vector * c.tile_rows * c.tile_columns}


class Call(NamedTuple):
    """A launch of a kernel that has no :class:`kernels.gpu.config.Config`.

    ``elements`` are those of a program, or of one iteration of its loop; ``moved`` is the minimum of bytes moved.
    """

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    elements: int
    moved: int


def others(dtype: torch.dtype) -> dict[str, Call]:
    """By name, the kernels of a training step of the paper's network other than its stages, launched on meta tensors.

    Args:
        dtype: of activations and gradients; if it is a half type, each weight has a copy in it.
    """
    half = dtype != torch.float32
    size = dtype.itemsize

    def meta(*shape: int, like: torch.dtype = dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=like, device="meta")
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    # After conv3, whose output is one tensor; conv4 reads two.
    joint, bias = meta(BATCH, 384, 13, 13), meta(384, like=torch.float32)
    maps, apart = joint.chunk(2, 1), [meta(BATCH, 192, 13, 13) for _ in range(2)]
    sums = meta(bias_relu.rows(joint), 384, like=torch.float32)
    weights = [meta(count, like=torch.float32) for count in PAPER_WEIGHTS]
    parameters = [update.Parameter(each, each.to(dtype), each, each.to(dtype) if half else None) for each in weights]
    rate = meta(like=torch.float32)
    images = torch.empty((BATCH, 256, 256, 3), dtype=torch.uint8, device="meta")
    mean, drawn = meta(256, 256, 3, like=torch.float32), meta(BATCH, 6, like=torch.float32)

    def cropped(**layout: Any) -> Tensor:
        return input_.training_input(images, mean, drawn[:, :3], drawn[:, 3:], 1.0, 224, dtype=dtype, **layout)

    launched: dict[str, tuple[Callable[[], object], int, int]] = {
        "input, pixels": (cropped, input_.ELEMENTS, BATCH * 3 * 224**2 * (1 + size)),
        # Of 4 x 4 pixels: the crop, and four rows and columns of zeros.
        "input, blocks": (
            lambda: cropped(block=4, blocks=57),
            input_.ELEMENTS,
            BATCH * 3 * (224**2 + 228**2 * size),
        ),
        "update": (
            lambda: update.update_together_(parameters, rate, 0.9, 5e-4),
            update.ELEMENTS,
            (16 + (1 + half) * size) * sum(PAPER_WEIGHTS),
        ),
        "loss": (
            lambda: loss.cross_entropy(meta(BATCH, 1000), meta(BATCH, like=torch.int64)),
            1024,
            2 * BATCH * 1000 * size,
        ),
        "bias and ReLU": (
            lambda: bias_relu.forward(maps, bias, apart),
            bias_relu.PIXELS * bias_relu.CHANNELS,
            2 * joint.numel() * size,
        ),
        "bias and ReLU, backward": (
            lambda: bias_relu.gradients(apart, apart, maps, sums),
            bias_relu.PIXELS * bias_relu.CHANNELS,
            3 * joint.numel() * size,
        ),
    }
    found = {}
    for name, (launch, elements, moved) in launched.items():
        with _recorded() as calls:
            launch()
        ((kernel, arguments, options),) = calls
        found[name] = Call(kernel, arguments, options, elements, moved)
    return found


@contextlib.contextmanager
def _recorded() -> Iterator[list[tuple[Any, dict[str, Any], dict[str, Any]]]]:
    """Inside a ``with`` block, launches only record their kernel, arguments and options in the list."""
    calls = []

    def run(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, values, strict=False))
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        calls.append((kernel, arguments, {name: named[name] for name in named if name not in kernel.arg_names}))

    original = triton.JITFunction.run
    triton.JITFunction.run = run
    try:
        yield calls
    finally:
        triton.JITFunction.run = original


def build_call(call: Call, target: str, aligned: bool = True) -> dict[str, Any]:
    """Compile a call for a target and read its machine code, like :func:`build`."""
    arch = _target(target)
    compiled = triton.compile(specialized(call.kernel, call.arguments, aligned), target=arch, options=call.options)
    threads = call.options["num_warps"] * arch.warp_size
    # These programs have four warps; warps per scheduler are computed only for one-warp programs.
    return {**_read(compiled), "warps": None, "elements_a_step": max(1, call.elements // threads)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs to build for")
    parser.add_argument("--case", nargs="+", choices=[*(case.name for case in CASES), *OTHERS], help="what to build")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of input and output")
    parser.add_argument("--memory-format", nargs="+", choices=FORMATS, default=list(FORMATS), help="of both")
    parser.add_argument("--misaligned", action="store_true", help="tensors that do not begin at multiples of 16 bytes")
    parser.add_argument("--output", metavar="FILE.json", help="where the rows are written as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Build according to the command line; returns the exit status."""
    wanted = parser().parse_args(arguments)
    if not isinstance(forward_kernel, triton.JITFunction):
        print("error: TRITON_INTERPRET=1 leaves nothing to compile; unset it", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []

    def found(row: dict[str, Any], name: str, **described: Any) -> None:
        elements = row["elements_a_step"]
        # A kernel without a loop has one iteration.
        instructions = row["loop_instructions"] or row["instructions"]
        print(
            f"  {name:60} {row['registers']:>5} {row['warps'] or '-':>5} {row['local_bytes']:>5} "
            f"{row['shared_bytes']:>6} {row['special_functions'] / elements:>7.2f} {instructions / elements:>5.0f}  "
            + ", ".join(f"{count} x {width}" for width, count in row["accesses"].items()),
            flush=True,
        )
        aligned = not wanted.misaligned
        rows.append({"target": target, **described, "aligned": aligned, "triton": triton.__version__, **row})

    for target in wanted.target:
        print(f"{target:59} registers warps local shared special   all  accesses to global memory")
        for case, dtype, format in itertools.product(CASES, wanted.dtype, wanted.memory_format):
            if wanted.case and case.name not in wanted.case:
                continue
            with launched_for(target):
                made = list(launches(case, DTYPES[dtype], FORMATS[format]))
            for mode, launch, moved in made:
                found(
                    build(launch, target, not wanted.misaligned),
                    f"{case.name}, {mode}, {dtype}, {format}",
                    case=case.name,
                    mode=mode,
                    dtype=dtype,
                    memory_format=format,
                    shape=list(case.shape),
                    least_bytes=moved,
                )
        for dtype in wanted.dtype:
            for name, call in others(DTYPES[dtype]).items():
                if wanted.case and name not in wanted.case:
                    continue
                row = build_call(call, target, not wanted.misaligned)
                found(row, f"{name}, {dtype}", case=name, mode=name, dtype=dtype, least_bytes=call.moved)
    if wanted.output:
        Path(wanted.output).write_text(json.dumps(rows, indent=1) + "\n")
        print(f"written to {wanted.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
