"""How long a multiprocessor takes to issue machine code of sm_90, clock by clock, from the code's own schedule.

NVIDIA's assembler writes into each instruction how many clocks its warp waits before the next one, which of six
scoreboards it waits for, and which it holds until its result is there or its operands are read (Jia et al., "Dissecting
the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv:1804.06826; the layout has been the same since). Here
the programs of one multiprocessor, each of them one warp, are issued by four schedulers that obey that:
one instruction a clock, and no sooner than the unit it needs is free. So rounds of programs, warps that wait for one
another's special functions and code that waits for itself cost what they cost. Branches other than the loop's are
passed by: they skip what lies outside the image.

How long a unit is taken follows from the results a clock that NVIDIA's programming guide gives for compute capability
9.0. Latencies are assumed, a load from memory as long as when the memory is busy, and so is the choice among warps that
could go on: the one that issued last, else the oldest. The rate of the memory itself is not in it: :mod:`bench.model`
sets it beside.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

SCHEDULERS = 4
REGISTERS_A_SCHEDULER = 16384
WARPS_A_SCHEDULER = 8
SHARED_BYTES = 227 * 1024
#: What the system keeps of the shared memory for each program.
SHARED_BYTES_KEPT = 1024
#: Clocks from a load to its result: from memory, the first-level cache, shared memory, constants.
MEMORY, CACHE, SHARED, CONSTANTS = 700, 40, 30, 40
#: Clocks from the end of a program to the first instruction of the one that takes its place.
LAUNCH = 200
SCOREBOARDS = 6
NONE = 7

_ALU = re.compile(
    "BMSK|F2FP|FLO|FMNMX|FSEL|FSETP?|I2FP|IABS|IADD3|IMNMX|ISETP|LEA|LOP3|MOV|P2R|PLOP3|POPC|PRMT|R2P|SEL|SGXT|SHF|"
    "VIADD|VIADDMNMX|VIMNMX3?|VOTE"
)


class Instruction(NamedTuple):
    """What the schedule knows of an instruction; units are ``""`` where none is short."""

    unit: str
    #: Clocks that the unit is taken, by one of a scheduler's warps; the load and store unit is one for all schedulers.
    taken: int
    #: Clocks until the result is there.
    latency: int
    #: Clocks until the warp may issue the next one.
    stall: int
    #: Scoreboards that are waited for.
    waits: tuple[int, ...]
    #: Scoreboards that are held until the result is there, and until the operands are read; NONE for none.
    result: int
    operands: int
    #: An asynchronous copy, or what puts the scoreboard of all before it.
    copies: bool = False
    commits: bool = False


class Code(NamedTuple):
    """Instructions before a loop, in a turn of it, and behind it."""

    before: list[Instruction]
    turn: list[Instruction]
    behind: list[Instruction]


def _unit(name: str, in_loop: bool, copied: bool) -> tuple[str, int, int]:
    """An instruction's unit, the clocks it is taken for, and the latency."""
    base, *parts = name.split(".")
    words = 4 if "128" in parts else 2 if "64" in parts else 1
    if base in ("FADD", "FFMA", "FMUL", "HADD2", "HFMA2", "HMUL2"):
        return "FMA", 1, 5
    if base in ("IMAD", "IDP"):
        return "FMA", 2, 5
    if _ALU.fullmatch(base):
        return "ALU", 2, 6
    if base in ("MUFU", "F2F", "F2I", "I2F"):
        return "XU", 8, 22
    if base == "SHFL":
        return "LSU", 1, 25
    if base in ("LDS", "STS"):
        return "LSU", words, SHARED
    if base in ("LDL", "STL"):
        return "LSU", words, CACHE
    if base in ("LDG", "LDGSTS"):
        # Where a loop's rows come by copies, what it loads besides is the bias.
        return "LSU", words, CACHE if base == "LDG" and in_loop and copied else MEMORY
    if base == "STG":
        return "LSU", words, SHARED
    if base in ("LDC", "ULDC"):
        return "LSU", 1, CONSTANTS
    if base.startswith("U"):
        return "U", 2, 12
    return "", 0, 30


def parse(listing: str) -> Code:
    """The code in a listing of ``cuobjdump -sass``, cut at its longest loop.

    Raises:
        ValueError: the listing has no loop, or none that instructions stand behind.
    """
    pattern = r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)([^;]*);.*\n.*/\* 0x([0-9a-f]{16}) \*/"
    lines = [
        (int(address, 16), (predicate or "").strip(), name, operands, int(word, 16))
        for address, predicate, name, operands, word in re.findall(pattern, listing)
    ]
    places = {line[0]: number for number, line in enumerate(lines)}
    first, last = 0, -1
    for number, (address, _, name, operands, _) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.split(".")[0] == "BRA" else None
        # What stands behind the last EXIT branches to itself.
        if target and int(target[1], 16) < address and number - places[int(target[1], 16)] > last - first:
            first, last = places[int(target[1], 16)], number
    ends = [number for number, line in enumerate(lines) if line[2] == "EXIT" and number > last]
    if last < 0 or not ends:
        raise ValueError("listing: must be of a kernel with a loop and an end")
    copied = any(line[2].startswith("LDGSTS") for line in lines[first : last + 1])
    code = []
    for number, (_, predicate, name, operands, word) in enumerate(lines[: ends[0] + 1]):
        base = name.split(".")[0]
        unit, taken, latency = _unit(name, first <= number <= last, copied)
        if predicate == "@!PT":
            unit, taken = "", 0
        # The upper word: four bits of stall from bit 41 on, one that is not used here, three for each scoreboard that
        # is held, six for those that are waited for.
        stall = max(word >> 41 & 15, 1, 16 if base == "BAR" else 8 if base in ("BRA", "EXIT") else 1)
        waits = [board for board in range(SCOREBOARDS) if word >> 52 + board & 1]
        if base == "DEPBAR" and (board := re.search(r"SB(\d)", operands)):
            waits.append(int(board[1]))
        result, operands_read = word >> 46 & 7, word >> 49 & 7
        kinds = base == "LDGSTS", base == "LDGDEPBAR"
        code.append(Instruction(unit, taken, latency, stall, tuple(waits), result, operands_read, *kinds))
    return Code(code[:first], code[first : last + 1], code[last + 1 :])


def warps(registers: int, shared_bytes: int = 0) -> int:
    """One-warp programs that a scheduler holds at once, by registers a thread and shared memory a program."""
    room = min(WARPS_A_SCHEDULER, REGISTERS_A_SCHEDULER // (32 * 8 * -(-registers // 8)))
    if shared_bytes:
        room = min(room, SHARED_BYTES // (shared_bytes + SHARED_BYTES_KEPT) // SCHEDULERS)
    return room


class _Warp:
    """A program on its way: where it is, when it may go on, and until when its scoreboards are held."""

    def __init__(self, code: list[Instruction], ready: int) -> None:
        self.code, self.ready = code, ready
        self.next = 0
        self.held = [0] * (NONE + 1)
        self.copied = 0

    def earliest(self) -> int:
        """The clock from which the next instruction waits for nothing but its unit."""
        clock = self.ready
        for board in self.code[self.next].waits:
            clock = max(clock, self.held[board])
        return clock


def clocks(code: Code, turns: Sequence[int], resident: int) -> int:
    """Clocks until a multiprocessor is done with its programs.

    Args:
        code: of a program.
        turns: of the loop, for each of the programs in the order in which they begin.
        resident: programs that a scheduler holds at once.
    """
    traces = {number: code.before + code.turn * number + code.behind for number in set(turns)}
    waiting = iter(turns)
    schedulers: list[list[_Warp]] = [[] for _ in range(SCHEDULERS)]
    for place in range(resident * SCHEDULERS):
        if (number := next(waiting, None)) is not None:
            schedulers[place % SCHEDULERS].append(_Warp(traces[number], 0))
    last: list[_Warp | None] = [None] * SCHEDULERS
    units: list[dict[str, int]] = [dict.fromkeys(("FMA", "ALU", "XU", "U", ""), 0) for _ in range(SCHEDULERS)]
    shared_unit = now = 0
    while any(schedulers):
        soonest = 1 << 62
        for index, (own, free) in enumerate(zip(schedulers, units, strict=True)):
            # The warp that issued last, then the oldest.
            latest = last[index]
            for warp in own if latest is None else (latest, *own):
                step = warp.code[warp.next]
                # The load and store unit has a queue.
                clock = max(warp.earliest(), shared_unit - 8 if step.unit == "LSU" else free[step.unit])
                if clock <= now:
                    break
                soonest = min(soonest, clock)
            else:
                continue
            soonest = now + 1
            begun = now
            if step.unit == "LSU":
                begun = max(shared_unit, now)
                shared_unit = begun + step.taken
            elif step.unit:
                free[step.unit] = now + step.taken
            done = begun + step.latency + step.taken
            if step.copies:
                warp.copied = max(warp.copied, done)
            elif step.commits:
                warp.held[0] = max(warp.held[0], warp.copied)
            else:
                warp.held[step.result] = max(warp.held[step.result], done)
            warp.held[step.operands] = max(warp.held[step.operands], begun + step.taken + 10)
            warp.ready = now + step.stall
            warp.next += 1
            last[index] = warp
            if warp.next == len(warp.code):
                last[index] = None
                own.remove(warp)
                if (number := next(waiting, None)) is not None:
                    own.append(_Warp(traces[number], now + LAUNCH))
        now = soonest
    return now
