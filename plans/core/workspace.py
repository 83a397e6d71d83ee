"""Scratch memory that the caller owns."""

from __future__ import annotations

from dataclasses import dataclass

from plans.core.device import DeviceBuffer


@dataclass(frozen=True)
class Workspace:
    """Scratch for one run at a time: at least ``plan.workspace_size()`` bytes, aligned to 256, or none at all."""

    buffer: DeviceBuffer | None = None

    @property
    def nbytes(self) -> int:
        """The size in bytes; 0 without a buffer."""
        return 0 if self.buffer is None else self.buffer.nbytes


NO_WORKSPACE = Workspace()
