"""Runs PTX, the code that Triton compiles a kernel to for NVIDIA's GPUs, on a CPU: slow, and strict where a GPU is not.

It ends with an error where a kernel

- reads or writes global memory outside its arguments' storages, writes to one that is not declared as written to,
  writes an element twice, or makes an access that is not aligned to its width, which a GPU refuses;
- reads shared memory that nothing was written to, that an asynchronous copy has not arrived in for certain, or that
  another lane has written without a barrier since;
- exchanges values with lanes that are not at work, reads a register before it is written, or uses an instruction that
  is not known here.

Asynchronous copies arrive as late as they may, when they are waited for. Approximate functions are off by as much as a
GPU's may be, with denormals flushed where the code says so; a result that is not a number is the one NaN that NVIDIA's
arithmetic has. A program's warps run like programs of their own, so a kernel in which they share memory is compiled for
one warp. What instructions do is in NVIDIA's "Parallel Thread Execution ISA".
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from kernels import aot
from kernels.gpu.forward import forward_kernel
from kernels.gpu.launch import Launch
from tests.ptx.emulated_memory import BITS, Array, EmulationError, Memory, Shared

#: What kernels are compiled for: an H200, or what ``KERNELS_TEST=ptx:TARGET`` names.
TARGET = os.environ.get("KERNELS_TEST", "").partition(":")[2] or "sm_90"
WARP = 32
#: Programs that are run at once, as rows of arrays.
ROWS = 512
#: Bytes from a parameter's address to the next one's, in the memory of parameters.
SPACING = 16
#: What approximate functions and divisions may be off by, relatively: two units in the last place.
ERROR = 2.0**-22
_NAN = np.uint32(0x7FFFFFFF)
_WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8}
_TYPES: dict[str, Any] = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "pred": np.bool_,
    **{f"s{bits}": np.dtype(f"i{size}") for bits, size in _WIDTHS.items()},
    **{f"{kind}{bits}": np.dtype(f"u{size}") for kind in "ub" for bits, size in _WIDTHS.items()},
}


class Instruction(NamedTuple):
    """``@guard name.parts operands``; the operands of a vector are a tuple."""

    guard: str | None
    unless: bool
    name: str
    parts: tuple[str, ...]
    operands: tuple[Any, ...]
    text: str


class Code(NamedTuple):
    """A kernel's instructions, the places of its labels, and the registers that are written anywhere."""

    instructions: list[Instruction]
    labels: dict[str, int]
    written: set[str]


def parse(ptx: str) -> Code:
    """The instructions of the one kernel in a text of PTX."""
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index(".entry") :])
    body = body[body.index("\n{") + 2 :]
    body = re.split(r"\n\}\n|\n\t\.section|\n\t?\.file", body)[0]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in re.sub(r"\n\s*\.(loc|pragma|file)[^\n]*", "\n", body).replace("\n", " ").split(";"):
        text = line.lstrip(" \t{}").rstrip()
        while label := re.match(r"(\$\w+):", text):
            labels[label[1]] = len(instructions)
            text = text[label.end() :].lstrip(" \t{}")
        if not text or text.startswith("."):
            continue
        match = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)$", text)
        if match is None:
            raise EmulationError(f"not understood: {text}")
        unless, guard, name, parts, rest = match.groups()
        operands: list[Any] = []
        for piece in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest):
            if piece.startswith("{"):
                operands.append(tuple(part.strip() for part in piece[1:-1].split(",")))
            elif piece.startswith("["):
                operands.append(piece[1:-1].replace(" ", ""))
            elif "|" in piece:
                operands.append(tuple(piece.split("|")))
            else:
                operands.append(piece)
        kinds = tuple(part for part in parts.split(".") if part)
        instructions.append(Instruction(guard, bool(unless), name, kinds, tuple(operands), text))
    results = [
        step.operands[0] for step in instructions if step.name not in ("st", "stmatrix", "bra", "bar") and step.operands
    ]
    written = {name for result in results for name in (result if isinstance(result, tuple) else (result,))}
    return Code(instructions, labels, written)


def _width(register: str) -> int:
    """Bytes of a register, which LLVM names by its kind."""
    return {"%rd": 8, "%rs": 2}.get(register[:3], 4)


def _mixed(parts: tuple[str, ...]) -> bool:
    """Whether an instruction adds numbers of a half type to a float32."""
    return parts[-2:] in (("f32", "f16"), ("f32", "bf16"))


def _rounded_to_bfloat16(values: Array) -> Array:
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _flushed(values: Array) -> Array:
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def _off(values: Array, operand: Array) -> Array:
    """Exact ``values`` of a float32 ``operand`` off by up to :data:`ERROR`, always alike for the same operand."""
    four = np.ascontiguousarray(operand).view(np.uint32) * np.uint32(2654435761) >> np.uint32(30)
    return (values * (1 + ERROR * (four * (2 / 3) - 1))).astype(np.float32)


def _quotient(numerator: Array, denominator: Array) -> Array:
    """Of integers towards zero, where NumPy's is towards minus infinity; by zero it is anything on a GPU."""
    if numerator.dtype.kind == "f":
        return _off(numerator.astype(np.float64) / denominator, denominator)
    safe = np.where(denominator == 0, denominator.dtype.type(1), denominator)
    down = numerator // safe
    return down + ((numerator % safe != 0) & ((numerator < 0) != (safe < 0))).astype(down.dtype)


#: What takes operands of one type to a result of that type.
_SIMPLE: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
}
#: With ``.NaN`` the result is not a number where an operand is none.
_STRICT: dict[str, Callable[..., Array]] = {"min": np.minimum, "max": np.maximum}
_APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "rsqrt": lambda value: 1 / np.sqrt(value),
    "sqrt": np.sqrt,
    "rcp": lambda value: 1 / value,
    "ex2": np.exp2,
    "lg2": np.log2,
}
_COMPARED: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_TESTS: dict[str, Callable[[Array], Array]] = {
    "notanumber": np.isnan,
    "number": lambda value: ~np.isnan(value),
    "infinite": np.isinf,
    "finite": np.isfinite,
}


class Machine:
    """Some programs of a launch, the rows of arrays whose columns are lanes."""

    def __init__(
        self,
        code: Code,
        parameters: Sequence[int | float],
        programs: Array,
        grid: Sequence[int],
        memory: Memory,
        shared: int,
        warps: int,
    ) -> None:
        self.code = code
        bits = [np.float32(each).view(np.uint32) if isinstance(each, float) else each for each in parameters]
        self.parameters = np.array([int(each) % (1 << 64) for each in bits], np.uint64)
        self.memory, self.shared = memory, Shared(len(programs), shared)
        self.shape = (len(programs), WARP)
        self.registers: dict[str, Array] = {}
        self.rows, self.lanes = np.indices(self.shape)
        #: What special registers hold. A row is a warp of a program.
        self.special: dict[str, Any] = {"tid.x": programs[:, None] % warps * WARP + self.lanes, "ntid.x": warps * WARP}
        numbers = programs[:, None] // warps
        for axis, count in zip("xyz", grid, strict=True):
            self.special |= {f"ctaid.{axis}": numbers % count, f"nctaid.{axis}": count}
            numbers = numbers // count

    def run(self) -> None:
        """All lanes to their ends; those that are furthest behind go on first, which brings them together again."""
        places = np.zeros(self.shape, np.int64)
        end = len(self.code.instructions)
        joins = set(self.code.labels.values())
        with np.errstate(all="ignore"):
            while (place := int(places.min())) < end:
                mask = places == place
                while True:
                    instruction = self.code.instructions[place]
                    if instruction.name == "ret":
                        places[mask] = place + 1
                        places[self._guarded(instruction, mask)] = end
                        break
                    if instruction.name == "bra":
                        taken = self._guarded(instruction, mask)
                        places[mask] = place + 1
                        places[taken] = self.code.labels[instruction.operands[0]]
                        break
                    try:
                        self._step(instruction, mask)
                    except EmulationError as error:
                        raise EmulationError(f"{error}: {instruction.text}") from None
                    place += 1
                    if place in joins:
                        places[mask] = place
                        break

    def _guarded(self, instruction: Instruction, mask: Array) -> Array:
        if instruction.guard is None:
            return mask
        guard = self._register(instruction.guard)
        return mask & (~guard if instruction.unless else guard)

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            if name in self.code.written:
                raise EmulationError(f"{name} is read before it is written")
            # What the compiler knows not to matter has a register that nothing is ever written to.
            if name.startswith("%p"):
                return np.ones(self.shape, np.bool_)
            return np.full(self.shape, 0xA5A5A5A5 % (1 << 8 * _width(name)), BITS[_width(name)])
        return self.registers[name]

    def _read(self, operand: str, type: str) -> Array:
        """An operand, as numbers of a type."""
        if type == "bf16":
            return (self._read(operand, "u16").astype(np.uint32) << np.uint32(16)).view(np.float32)
        if type.endswith("x2"):
            # Two numbers side by side, so that there are twice as many columns.
            pairs = np.ascontiguousarray(self._read(operand, "b64" if type == "f32x2" else "b32"))
            if type == "bf16x2":
                return (pairs.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
            return pairs.view(_TYPES[type.removesuffix("x2")])
        if type not in _TYPES:
            raise EmulationError("unknown type")
        dtype = np.dtype(_TYPES[type])
        if re.fullmatch(r"%(r|rd|rs|p)\d+", operand):
            value = self._register(operand)
            if value.dtype.itemsize != dtype.itemsize:
                raise EmulationError(f"{operand} is not of {8 * dtype.itemsize} bits")
            return value if dtype == np.bool_ else value.view(dtype)
        if operand.startswith("%") and (value := self.special.get(operand[1:])) is not None:
            return np.broadcast_to(np.asarray(value), self.shape).astype(np.uint32).view(dtype)
        if operand.startswith(("0f", "0F", "0d", "0D")):
            bits = int(operand[2:], 16)
            return np.full(self.shape, bits, BITS[len(operand) // 2 - 1]).view(dtype)
        if operand == "global_smem":
            return np.zeros(self.shape, dtype)
        if match := re.search(r"_param_(\d+)$", operand):
            return np.full(self.shape, SPACING * int(match[1]), dtype)
        try:
            number = int(operand.rstrip("U"), 0)
        except ValueError:
            raise EmulationError(f"unknown operand {operand}") from None
        return np.full(self.shape, number % (1 << 8 * dtype.itemsize), BITS[dtype.itemsize]).view(dtype)

    def _write(self, name: str, values: Array, mask: Array) -> None:
        if name == "_":
            return
        if values.dtype.kind == "f" and values.dtype.itemsize == 4:
            values = np.where(np.isnan(values), _NAN, values.view(np.uint32))
        if values.shape[-1] == 2 * WARP:
            values = np.ascontiguousarray(values).view(np.uint64)
        if values.dtype != np.bool_:
            values = np.ascontiguousarray(np.broadcast_to(values, self.shape)).view(BITS[values.dtype.itemsize])
        if not mask.all():
            before = self.registers.get(name)
            if before is None:
                before = np.full(self.shape, 1 if values.dtype == np.bool_ else 0xA5, values.dtype)
            values = np.where(mask, values, before)
        self.registers[name] = values

    def _address(self, operand: str, size: int) -> Array:
        register, _, offset = operand.partition("+")
        number = -int(offset[1:]) if offset.startswith("-") else int(offset or 0)
        base = self._read(register, "u64" if size == 8 else "u32")
        return base + base.dtype.type(number % (1 << 8 * size))

    def _step(self, instruction: Instruction, mask: Array) -> None:
        mask = self._guarded(instruction, mask)
        name, parts, operands = instruction.name, instruction.parts, instruction.operands
        if name == "div" and "rn" in parts:
            self._simple(parts, operands, mask, np.divide)
        elif name in _SIMPLE:
            self._simple(parts, operands, mask, _STRICT[name] if "NaN" in parts else _SIMPLE[name])
        elif name in _APPROXIMATE:
            self._approximate(_APPROXIMATE[name], parts, operands, mask)
        elif method := getattr(self, f"_{name}_", None):
            method(parts, operands, mask)
        else:
            raise EmulationError("unknown instruction")

    def _operands(self, parts: tuple[str, ...], sources: Sequence[str]) -> list[Array]:
        """Operands of one type, which is named last; where float32 is named before it the last one is that."""
        types = [parts[-1]] * (len(sources) - 1) + ["f32" if _mixed(parts) else parts[-1]]
        return [self._read(source, type) for source, type in zip(sources, types, strict=True)]

    def _simple(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array, function: Any) -> None:
        result, *sources = operands
        values = function(*self._operands(parts, sources))
        rounded = parts[-1] == "bf16" and not _mixed(parts)
        self._write(result, _rounded_to_bfloat16(values) if rounded else values, mask)

    # Data movement.

    def _ld_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, source = operands
        dtype = np.dtype(_TYPES[parts[-1]])
        width = dtype.itemsize
        results = result if isinstance(result, tuple) else (result,)
        found: Array
        if not mask.any():
            found = np.zeros((0, len(results)), dtype)
        elif parts[0] == "param":
            numbers, offsets = np.divmod(self._address(source, 4)[mask], np.uint32(SPACING))
            if offsets.any() or numbers.max() >= len(self.parameters):
                raise EmulationError("reads what is no parameter")
            found = self.parameters[numbers].astype(BITS[width])[:, None]
        elif parts[0] == "shared":
            addresses = self._address(source, 4)[mask]
            found = self.shared.load(self.rows[mask], self.lanes[mask], addresses, width * len(results))
        elif parts[0] == "global":
            found = self.memory.read(self._address(source, 8)[mask], width, len(results))
        else:
            raise EmulationError("unknown memory")
        found = np.ascontiguousarray(found).view(dtype)
        for number, name in enumerate(results):
            # Registers may be wider than what is loaded.
            wide = max(width, _width(name))
            values = np.zeros(self.shape, f"{'i' if dtype.kind == 'i' else 'u'}{wide}")
            column = np.ascontiguousarray(found[:, number])
            values[mask] = column.view(values.dtype) if dtype.kind == "f" else column.astype(values.dtype)
            self._write(name, values, mask)

    def _st_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        place, source = operands
        width = _WIDTHS[re.sub(r"\D", "", parts[-1])]
        if not mask.any():
            return
        sources = source if isinstance(source, tuple) else (source,)
        columns = []
        for name in sources:
            value = self._register(name) if name.startswith("%") else self._read(name, f"b{8 * width}")
            columns.append(value[mask].astype(BITS[width]))
        values = np.ascontiguousarray(np.stack(columns, 1))
        if parts[0] == "shared":
            data = values.view(np.uint8)
            self.shared.store(self.rows[mask], self.lanes[mask], self._address(place, 4)[mask], data)
        elif parts[0] == "global":
            self.memory.write(self._address(place, 8)[mask], values, width)
        else:
            raise EmulationError("unknown memory")

    def _cp_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        if parts[0] != "async":
            raise EmulationError("unknown instruction")
        if parts[1] == "commit_group":
            self.shared.commit(mask.any(1))
        elif parts[1] == "wait_group":
            self.shared.wait(int(operands[0]), mask.any(1))
        elif parts[1] == "wait_all":
            self.shared.commit(mask.any(1))
            self.shared.wait(0, mask.any(1))
        elif mask.any():
            target, source, size, *rest = operands
            count = int(size, 0)
            read = self._read(rest[0], "u32") if rest else np.full(self.shape, count, np.uint32)
            if not np.isin(read[mask], (0, count)).all():
                raise EmulationError("copies part of its bytes")
            data = np.zeros((int(mask.sum()), count), np.uint8)
            there = read[mask] > 0
            if there.any():
                addresses = self._address(source, 8)[mask][there]
                data[there] = np.ascontiguousarray(self.memory.read(addresses, 4, count // 4)).view(np.uint8)
            self.shared.copy(self.rows[mask], self.lanes[mask], self._address(target, 4)[mask], data)

    def _ldmatrix_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        results, source = operands
        for number, name in enumerate(results):
            active, rows, places = self._matrix(parts, source, number, mask)
            data = self.shared.load(rows, np.full(len(rows), WARP), places, 16)
            matrix = np.ascontiguousarray(data).view(np.uint16).reshape(-1, 8, 8)
            if "trans" in parts:
                matrix = matrix.transpose(0, 2, 1)
            values = np.zeros(self.shape, np.uint32)
            values[active] = np.ascontiguousarray(matrix).reshape(len(active), -1).view(np.uint32)
            self._write(name, values, mask)

    def _stmatrix_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        target, sources = operands
        for number, name in enumerate(sources):
            active, rows, places = self._matrix(parts, target, number, mask)
            matrix = np.ascontiguousarray(self._read(name, "b32")[active]).view(np.uint16).reshape(-1, 8, 8)
            if "trans" in parts:
                matrix = matrix.transpose(0, 2, 1)
            data = np.ascontiguousarray(matrix).view(np.uint8).reshape(len(rows), 16)
            self.shared.store(rows, np.full(len(rows), WARP), places, data)

    def _matrix(self, parts: tuple[str, ...], operand: str, number: int, mask: Array) -> tuple[Array, Array, Array]:
        """The programs at work, and for each row of their matrices its program and address.

        Eight lanes say where a matrix's eight rows of 16 bytes are; each lane holds two of its 64 elements.
        """
        if parts[:3] != ("sync", "aligned", "m8n8") or parts[-1] != "b16":
            raise EmulationError("unknown instruction")
        self._together(mask)
        active = np.flatnonzero(mask.any(1))
        places = self._address(operand, 4)[active, 8 * number : 8 * number + 8]
        return active, np.repeat(active, 8), places.reshape(-1)

    @staticmethod
    def _together(mask: Array) -> None:
        if (mask.any(1) != mask.all(1)).any():
            raise EmulationError("values are exchanged with lanes that are not at work")

    def _bar_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        self._together(mask)
        self.shared.barrier(mask.any(1))

    def _shfl_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, source, lane, clamp, members = operands
        if parts != ("sync", "idx", "b32") and parts != ("sync", "bfly", "b32"):
            raise EmulationError("unknown instruction")
        if clamp not in ("31", "0x1f") or members not in ("-1", "0xffffffff"):
            raise EmulationError("unknown instruction")
        self._together(mask)
        index = self._read(lane, "u32").astype(np.int64)
        index = self.lanes ^ index if parts[1] == "bfly" else index
        self._write(result, np.take_along_axis(self._read(source, "b32"), index & 31, 1), mask)

    def _redux_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, source, members = operands
        (_, operation, *strict), kind = parts[:-1], parts[-1]
        if operation not in _STRICT or strict not in ([], ["NaN"]) or kind not in ("s32", "f32"):
            raise EmulationError("unknown instruction")
        if (self._read(members, "s32")[mask] != -1).any():
            raise EmulationError("unknown instruction")
        self._together(mask)
        extreme: Any = (_STRICT if strict else _SIMPLE)[operation]
        reduced = extreme.reduce(self._read(source, kind), 1, keepdims=True)
        self._write(result, np.broadcast_to(reduced, self.shape), mask)

    def _mov_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, source = operands
        width = parts[-1]
        if isinstance(source, tuple):
            each = 8 * _WIDTHS[re.sub(r"\D", "", width)] // len(source)
            pieces = [self._read(piece, f"b{each}") for piece in source]
            values = np.ascontiguousarray(np.stack(pieces, -1)).view(_TYPES[width])[..., 0]
            self._write(result, values, mask)
        elif isinstance(result, tuple):
            whole = np.ascontiguousarray(self._read(source, width))[..., None]
            pieces = whole.view(BITS[whole.dtype.itemsize // len(result)])
            for number, name in enumerate(result):
                self._write(name, pieces[..., number], mask)
        elif width == "pred" and not source.startswith("%"):
            self._write(result, np.full(self.shape, int(source, 0) != 0), mask)
        else:
            self._write(result, self._read(source, width), mask)

    def _selp_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, one, other, condition = operands
        # Bits are kept as they are.
        type = f"b{re.sub(r'[^0-9]', '', parts[-1])}"
        values = np.where(self._read(condition, "pred"), self._read(one, type), self._read(other, type))
        self._write(result, values, mask)

    def _cvt_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, *sources = operands
        target, source = parts[-2:]
        if target in ("bf16x2", "f16x2"):
            values = [self._read(name, "f32") for name in reversed(sources)]
            halves = [_rounded_to_bfloat16(value) if target[0] == "b" else self._half(value) for value in values]
            self._write(result, np.ascontiguousarray(np.stack(halves, -1)).view(np.uint32)[..., 0], mask)
            return
        if source in ("s32", "u32") and sources[0].startswith("%rd"):
            # The register may be wider than what is converted.
            values = self._read(sources[0], "b64").astype(np.uint32).view(_TYPES[source])
        else:
            values = self._read(sources[0], source)
        if target == "bf16":
            self._write(result, _rounded_to_bfloat16(values), mask)
        elif target == "f16":
            self._write(result, self._half(values), mask)
        elif target[0] in "su" and source[0] == "f":
            self._write(result, np.trunc(values).astype(_TYPES[target]), mask)
        else:
            self._write(result, values.astype(_TYPES[target]), mask)

    @staticmethod
    def _half(values: Array) -> Array:
        return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))

    # Comparisons and logic.

    def _setp_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, one, other, *rest = operands
        first, second = self._read(one, parts[-1]), self._read(other, parts[-1])
        comparison = parts[0]
        if comparison in ("num", "nan"):
            values = np.isnan(first) | np.isnan(second)
            values = ~values if comparison == "num" else values
        elif comparison in _COMPARED and not (first.dtype.kind == "f" and comparison == "ne"):
            values = _COMPARED[comparison](first, second)
        elif comparison == "ne":
            values = (first != second) & ~np.isnan(first) & ~np.isnan(second)
        elif comparison.removesuffix("u") in _COMPARED:
            values = _COMPARED[comparison.removesuffix("u")](first, second) | np.isnan(first) | np.isnan(second)
        else:
            raise EmulationError("unknown comparison")
        if rest:
            values = _SIMPLE[parts[1]](values, self._read(rest[0].lstrip("!"), "pred") ^ rest[0].startswith("!"))
        results = result if isinstance(result, tuple) else (result,)
        for number, name in enumerate(results):
            self._write(name, values[:, number :: len(results)], mask)

    def _testp_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, source = operands
        value = self._read(source, parts[-1])
        self._write(result, _TESTS[parts[0]](value), mask)

    def _shl_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        self._shifted(parts, operands, mask, np.left_shift)

    def _shr_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        self._shifted(parts, operands, mask, np.right_shift)

    def _shifted(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array, function: Any) -> None:
        result, value, count = operands
        number = self._read(value, parts[-1])
        bits = 8 * number.dtype.itemsize
        by = self._read(count, "u32")
        # Further than a register is wide nothing is left, or the sign.
        inside = np.minimum(by, bits - 1).astype(number.dtype)
        values = function(number, inside)
        if number.dtype.kind == "u":
            values = np.where(by < bits, values, number.dtype.type(0))
        self._write(result, values, mask)

    def _bfe_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, value, start, length = operands
        first, count = int(start, 0), int(length, 0)
        number = self._read(value, parts[-1])
        bits = 8 * number.dtype.itemsize
        up = number.dtype.type(bits - first - count)
        self._write(result, (number << up) >> number.dtype.type(bits - count), mask)

    def _prmt_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, low, high, selector = operands
        pair = np.stack([self._read(low, "b32"), self._read(high, "b32")], -1)
        source = np.ascontiguousarray(pair).view(np.uint8)
        chosen = self._read(selector, "b32")
        pieces = []
        for number in range(4):
            nibble = chosen >> np.uint32(4 * number) & np.uint32(15)
            byte = np.take_along_axis(source, (nibble & 7).astype(np.int64)[..., None], -1)[..., 0]
            signs = np.where(byte >> 7, np.uint8(255), np.uint8(0))
            pieces.append(np.where(nibble > 7, signs, byte))
        self._write(result, np.ascontiguousarray(np.stack(pieces, -1)).view(np.uint32)[..., 0], mask)

    # Arithmetic.

    def _mul_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        result, one, other, *addend = operands
        first, second = self._read(one, parts[-1]), self._read(other, parts[-1])
        type = parts[-1]
        if "wide" in parts:
            type = f"{type[0]}{2 * int(type[1:])}"
            values = first.astype(_TYPES[type]) * second.astype(_TYPES[type])
        elif "hi" in parts:
            if type not in ("u16", "s16", "u32", "s32"):
                raise EmulationError("unknown instruction")
            wide = np.dtype(f"{first.dtype.kind}{2 * first.dtype.itemsize}")
            product = first.astype(wide) * second.astype(wide)
            values = (product >> wide.type(8 * first.dtype.itemsize)).astype(first.dtype)
        else:
            values = first * second
        if addend:
            values = values + self._read(addend[0], type)
        self._write(result, values, mask)

    _mad_ = _mul_

    def _fma_(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        # The product of two float32 is a float64 without rounding.
        result, *sources = operands
        one, other, addend = (value.astype(np.float64) for value in self._operands(parts, sources))
        self._write(result, (one * other + addend).astype(np.float32), mask)

    def _approximate(self, function: Any, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Array) -> None:
        value = self._read(operands[1], "f32")
        value = _flushed(value) if "ftz" in parts else value
        values = _off(function(value.astype(np.float64)), value)
        self._write(operands[0], _flushed(values) if "ftz" in parts else values, mask)


def execute(
    ptx: str,
    parameters: Sequence[int | float],
    tensors: Mapping[str, Tensor],
    written: Sequence[str],
    grid: int | tuple[int, ...],
    shared: int,
    warps: int = 1,
) -> None:
    """Run all programs of a launch.

    Args:
        ptx: of the kernel.
        parameters: of the kernel in their order, addresses of tensors among them.
        tensors: whose storages may be read.
        written: names of those that may be written to.
        grid: number of programs, or along each axis.
        shared: bytes of shared memory of each.
        warps: of each.

    Raises:
        EmulationError: see above.
    """
    if shared and warps > 1:
        raise EmulationError("a program's warps share memory")
    code, memory = parse(ptx), Memory(tensors, written)
    axes = ((grid,) if isinstance(grid, int) else grid) + (1, 1)
    count = math.prod(axes) * warps
    for first in range(0, count, ROWS):
        rows = np.arange(first, min(first + ROWS, count))
        Machine(code, parameters, rows, axes[:3], memory, shared, warps).run()


def _parameters(arguments: Mapping[str, Any], signature: Mapping[str, Any]) -> list[Any]:
    """The run-time arguments in the compiled kernel's order: tuples flat, and without what it was compiled for."""
    found = []
    for name, kinds in signature.items():
        if kinds == "constexpr":
            continue
        values = arguments[name]
        pairs = zip(values, kinds, strict=True) if isinstance(values, tuple) else [(values, kinds)]
        found += [value for value, kind in pairs if kind != "constexpr"]
    return found


def _execute(
    compiled: Any,
    arguments: Mapping[str, Any],
    signature: Mapping[str, Any],
    written: Sequence[str],
    grid: tuple[int, ...],
    warps: int,
) -> None:
    tensors = {}
    for name, value in arguments.items():
        for number, each in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(each, Tensor):
                tensors[name if each is value else f"{name} {number}"] = each
    parameters = _parameters(arguments, signature)
    addresses = [value.data_ptr() if isinstance(value, Tensor) else value for value in parameters]
    names = [name for name in tensors if name.split()[0] in written]
    # The last two are of Triton's own memory, which these kernels have none of.
    execute(compiled.asm["ptx"], [*addresses, 0, 0], tensors, names, grid, compiled.metadata.shared, warps)


def run(launch: Launch, device: torch.device) -> None:
    """:meth:`kernels.gpu.launch.Launch.run` for tensors on a CPU: compiles for :data:`TARGET` and executes that."""
    source = aot.source(launch)
    target = aot._target(TARGET)
    compiled = triton.compile(source, target=target, options=launch.options(target.arch // 10))
    written = ("output", "offsets") if launch.kernel is forward_kernel else ("gradient", "sums")
    _execute(compiled, launch.arguments, source.signature, written, launch.grid, 1)


#: What kernels other than the stages write to, by name.
WRITTEN = {
    "bias_relu_kernel": ("outputs",),
    "bias_relu_backward_kernel": ("results", "sums"),
    "input_kernel": ("output",),
    "joint_update_kernel": ("weights", "velocities", "copies"),
    "loss_kernel": ("gradient", "results"),
    "update_kernel": ("weight", "velocity", "copy"),
}


def run_kernel(kernel: Any, *values: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
    """``triton.JITFunction.run`` for tensors on a CPU: compiles for :data:`TARGET` and executes that."""
    arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
    options = {name: arguments.pop(name) for name in named if name not in kernel.arg_names}
    source, target = aot.specialized(kernel, arguments), aot._target(TARGET)
    compiled = triton.compile(source, target=target, options=options)
    if compiled.metadata.shared:
        options["num_warps"] = 1
        compiled = triton.compile(source, target=target, options=options)
    warps = options["num_warps"]
    _execute(compiled, arguments, source.signature, WRITTEN[kernel.fn.__name__], grid, warps)
