"""Static checks of pickles, before anything is built from them."""

import io
import pickletools
import re
import typing
from typing import Any

#: Maximum number of values in a pickle, which take some seconds to read. A checkpoint of 21,000 classes has 50,000, a
#: batch of CIFAR-10 10,000.
VALUES = 2_000_000


def values(content: io.BytesIO, allowed: re.Pattern[str]) -> int:
    """Scan one pickle to its end; returns the number of values it describes, counting memoized values at each use.

    A pickle can reference parts of itself repeatedly: thirty nested pairs, each of the previous one twice, take two
    bytes each, and comparing or hashing the result takes a billion steps.

    Args:
        content: positioned at the pickle.
        allowed: the globals it may reference, as ``module name``. Protocol 4 takes their names from the stack; the
            unpickler must check those.

    Raises:
        ValueError: it is damaged, references another global, or describes more than :data:`VALUES`.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for number, (code, given, _) in enumerate(pickletools.genops(content)):
        name, argument = code.name, typing.cast(Any, given)
        if name == "GLOBAL" and not allowed.fullmatch(argument):
            raise ValueError(f"its pickle references {argument.replace(' ', '.')}")
        if name in ("INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle uses the opcode {name}")
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            continue
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else argument
            if place > number:
                raise ValueError("it is damaged")
            memo[place] = stack[-1]
            continue
        if name == "MARK":
            marks.append(len(stack))
            continue
        before = [item.name for item in code.stack_before]
        if "mark" in before:
            first = marks.pop() - before.index("mark")
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
            continue
        else:
            first = len(stack) - len(before)
        if first < 0:
            raise ValueError("it is damaged")
        total = 1 + sum(stack[first:])
        if total > VALUES or number > VALUES:
            raise ValueError(f"it describes more than {VALUES:,} values")
        stack[first:] = [total] * len(code.stack_after)
    # Minus one for the STOP opcode.
    return total - 1
