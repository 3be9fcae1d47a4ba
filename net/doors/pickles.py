"""Pickles, looked through before anything is built from them."""

import io
import pickletools
import re
import typing
from typing import Any

#: Values that a pickle may describe: a checkpoint of 21,000 classes has 50,000, a batch of CIFAR-10 10,000. Reading so
#: many takes some seconds.
VALUES = 2_000_000


def values(content: io.BytesIO, allowed: re.Pattern[str]) -> int:
    """Read one pickle to its end; returns how many values it describes, those it names again counted again.

    A pickle may name a part of itself again and again: of thirty nested pairs of the same, each takes two bytes, and
    comparing or hashing them takes a billion steps.

    Args:
        content: positioned at the pickle.
        allowed: what it may ask for, as ``module name``. Protocol 4 asks with names from the stack, which the one who
            builds the values has to compare.

    Raises:
        ValueError: it is damaged, asks for something else, or describes more than :data:`VALUES`.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for number, (code, given, _) in enumerate(pickletools.genops(content)):
        name, argument = code.name, typing.cast(Any, given)
        if name == "GLOBAL" and not allowed.fullmatch(argument):
            raise ValueError(f"it asks for {argument.replace(' ', '.')}")
        if name in ("INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it asks for something by {name}")
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
    # The last one is for the end.
    return total - 1
