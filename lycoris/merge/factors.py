"""Stored factors: where they lie, whose they are, and whether they are numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lycoris.checkpoint import SafetensorsFile, TensorEntry
from lycoris.errors import RefusedInput
from lycoris.merge.bits import KINDS, all_finite
from plans.core import ElementKind

_SCAN_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor, or a range of one, in an adapter's file.

    Attributes:
        file: The open file.
        start: Offset of the first byte.
        nbytes: Bytes.
        kind: Of its elements.
        where: File, module and key, for messages.
    """

    file: SafetensorsFile
    start: int
    nbytes: int
    kind: ElementKind
    where: str

    @classmethod
    def of(cls, file: SafetensorsFile, entry: TensorEntry, where: str) -> Factor:
        """The whole tensor `entry` of `file`; `where` names its module."""
        return cls(file, entry.start, entry.nbytes, KINDS[entry.dtype], f"{where}: key {entry.name!r}")

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.nbytes // self.kind.itemsize

    def part(self, first: int, count: int) -> Factor:
        """`count` elements from `first` on."""
        size = self.kind.itemsize
        return replace(self, start=self.start + first * size, nbytes=count * size)

    def check_finite(self, data: np.ndarray) -> None:
        """Refuse NaN and infinity among `data`, uint8: some whole elements of the factor.

        Raises:
            RefusedInput: naming file, module and key.
        """
        if not all_finite(data, self.kind):
            raise RefusedInput(f"{self.where} holds NaN or infinity: its training failed; give a sound adapter")

    def scan(self) -> None:
        """Read the factor for nothing but `check_finite`."""
        buffer = np.empty(min(self.nbytes, _SCAN_BYTES), np.uint8)
        for offset in range(0, self.nbytes, _SCAN_BYTES):
            part = buffer[: self.nbytes - offset]
            self.file.read_into(part, self.start + offset)
            self.check_finite(part)
