"""Data types and tensors."""

from math import prod
from typing import Any

import numpy as np

from colrow.errors import InvalidArgument
from colrow.v1 import tensor_pb2

DTYPE_VALUES = {
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "bfloat16": tensor_pb2.DATA_TYPE_BFLOAT16,
    "float16": tensor_pb2.DATA_TYPE_FLOAT16,
}
_DTYPES = {value: name for name, value in DTYPE_VALUES.items()}
_ARRAY_TYPES: dict[tensor_pb2.DataType, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}


def dtype(value: tensor_pb2.DataType) -> str | None:
    """The name of a model's data type; None where it is not set."""
    if value == tensor_pb2.DATA_TYPE_UNSPECIFIED:
        return None
    if value not in _DTYPES:
        raise InvalidArgument("data_type", value, f"is none of {', '.join(DTYPE_VALUES)}")
    return _DTYPES[value]


def tensor_message(array: np.ndarray) -> tensor_pb2.Tensor:
    """A float array as float32, an integer one as int64."""
    kind = tensor_pb2.DATA_TYPE_INT64 if array.dtype.kind == "i" else tensor_pb2.DATA_TYPE_FLOAT32
    data = np.ascontiguousarray(array, dtype=_ARRAY_TYPES[kind])
    return tensor_pb2.Tensor(data_type=kind, shape=data.shape, data=data.tobytes())


def array(message: tensor_pb2.Tensor, field: str) -> np.ndarray:
    """The array of a message; InvalidArgument where its bytes don't fit its shape."""
    if message.data_type not in _ARRAY_TYPES:
        raise InvalidArgument(f"{field}.data_type", message.data_type, "send float32 or int64")
    kind = _ARRAY_TYPES[message.data_type]
    expected = prod(message.shape) * kind.itemsize
    if expected == 0 or len(message.data) != expected:
        raise InvalidArgument(
            f"{field}.data",
            f"{len(message.data)} bytes",
            f"shape {list(message.shape)} takes {expected}; it must not be empty",
        )
    return np.frombuffer(message.data, dtype=kind).reshape(tuple(message.shape))
