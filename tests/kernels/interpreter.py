"""Triton's interpreter, taught bfloat16.

On its own it holds bfloat16 as 16-bit integers, which it adds, multiplies and passes to matrix products as
such, and it truncates float32 where a GPU rounds to the nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def teach_bfloat16() -> None:
    """Once a process; changes nothing but what concerns bfloat16."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "knows_bfloat16"):
        return
    builder.knows_bfloat16 = True
    builder.binary_op = _in_float32(builder.binary_op, num_operands=2)
    builder.unary_op = _in_float32(builder.unary_op, num_operands=1)
    builder.create_dot = _dot(builder.create_dot)
    interpreter._convert_float = _convert(interpreter._convert_float)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _in_float32(original, num_operands: int):
    def operation(self, *args):
        operands, op = args[:num_operands], args[num_operands]
        if operands[0].dtype.scalar != tl.bfloat16:
            return original(self, *args)
        result = op(*(_to_float32(operand.data) for operand in operands))
        return interpreter.TensorHandle(result if result.dtype == bool else _to_bfloat16(result), tl.bfloat16)

    return operation


def _dot(original):
    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle(_to_float32(operand.data), tl.float32)

    def dot(self, a, b, *args):
        return original(self, widened(a), widened(b), *args)

    return dot


def _convert(original):
    def convert(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return _to_float32(data).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return _to_bfloat16(data)
        return original(data, source, target, rounding_mode)

    return convert
