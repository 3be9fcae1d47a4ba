"""Triton's interpreter without what it computes again at every operation, which is a third of its time."""

from typing import Any

import pytest


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Values and errors stay what they are."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    # Each device function would patch Triton's language anew, as its caller has done.
    patched = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = self.fn.__module__.startswith("kernels.")
        return self.rewrite()(*args, **kwargs) if ours else patched(self, *args, **kwargs)

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)

    # Operands of one shape are compared dimension by dimension.
    broadcast = TritonSemantic.broadcast_impl_value

    def compatible(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        if left.type.is_block() and right.type.is_block():
            data = [getattr(operand.handle, "data", None) for operand in (left, right)]
            if data[0] is not None and data[1] is not None and data[0].shape == data[1].shape:
                return left, right
        return broadcast(self, left, right)  # type: ignore[no-any-return]

    patch.setattr(TritonSemantic, "broadcast_impl_value", compatible)

    # A table of all dtypes is made to look one of them up.
    look_up, known = interpreter._get_np_dtype, {}

    def dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in known:
            known[name] = look_up(type)
        return known[name]

    patch.setattr(interpreter, "_get_np_dtype", dtype)
