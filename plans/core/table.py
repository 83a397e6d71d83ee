"""Tables in device memory that grouped launches read: rows of kernel parameters, and lists of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from plans.core.device import ALIGNMENT, Device, DeviceBuffer
from plans.core.errors import BufferTooSmall, InvalidProblem, MisalignedOperand


def aligned(nbytes: int) -> int:
    """Bytes rounded up to what buffers are aligned to."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def places(sizes: Sequence[int]) -> list[int]:
    """Where each of several things begins, one after the other and aligned, and where the last one ends."""
    return [int(at) for at in np.cumsum([0, *map(aligned, sizes)])]


def table_words(rows: Sequence[tuple]) -> np.ndarray:
    """Rows of kernel arguments as 64-bit words: addresses, integers, and fp32 values by their bits."""
    words = np.empty((len(rows), len(rows[0])), np.int64)
    for column, values in enumerate(zip(*rows, strict=True)):
        if isinstance(values[0], np.float32):
            words[:, column] = np.array(values, np.float32).view(np.uint32)
        elif isinstance(values[0], np.ndarray):
            words[:, column] = [array.ctypes.data for array in values]
        else:
            words[:, column] = values
    return words


def check_table(plan: str, table: DeviceBuffer | None, wanted_bytes: int, device: Device) -> None:
    """Refuse a table that is missing, on another device, too small or misaligned."""
    if table is None:
        raise InvalidProblem(f"{plan}: no table given, wanted plan.table_size() bytes: {wanted_bytes}; allocate them")
    if table.device.ordinal != device.ordinal:
        found = table.device.ordinal
        raise InvalidProblem(
            f"{plan}: the table is on device {found}, the plan is for device {device.ordinal}; allocate it there"
        )
    if table.nbytes < wanted_bytes:
        raise BufferTooSmall(f"{plan}: table", wanted_bytes, table.nbytes, "bytes")
    if table.address % 8:
        raise MisalignedOperand(
            f"{plan}: the table lies at {table.address:#x}, wanted a multiple of 8 bytes; allocate it on its own"
        )
