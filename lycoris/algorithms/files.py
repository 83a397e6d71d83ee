"""Modules in files: saved as LyCORIS names them, loaded from any adapter file that `lycoris.formats` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from lycoris.algorithms.locon import LoConModule
from lycoris.algorithms.loha import LoHaModule
from lycoris.algorithms.lokr import LoKrModule
from lycoris.algorithms.module import LycorisModule
from lycoris.algorithms.unfactored import FullModule, IA3Module, NormModule
from lycoris.buffers import DeviceArray
from lycoris.checkpoint import SafetensorsFile
from lycoris.checkpoint.staging import StagedFile, find_leftovers, publish, remove, temporary_beside
from lycoris.errors import MergeFailed, RefusedInput, os_reason
from lycoris.formats import AdapterModule, read_adapter
from lycoris.formats.keys import DORA
from lycoris.formats.shapes import Shape
from plans.core import Device
from plans.weight import WeightLayout

MODULES: dict[str, type[LycorisModule]] = {
    module.algorithm: module for module in (LoConModule, LoHaModule, LoKrModule, FullModule, NormModule, IA3Module)
}
"""Algorithm, as in `lycoris.formats.keys.ALGORITHMS` -> module."""


def save(
    path: str | os.PathLike[str],
    modules: Mapping[str, LycorisModule],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write modules to a .safetensors file as ``<name>.<factor>``; the file appears whole or not at all.

    LyCORIS finds a layer by ``lycoris_`` or ``lora_unet_`` and the layer's path with _ for dots. ``metadata`` goes
    into the file's header. Raises RefusedInput where the file exists, MergeFailed where it cannot be written.
    """
    tensors = {
        f"{name}.{factor}": tensor.numpy()
        for name, module in modules.items()
        for factor, tensor in module.state_dict().items()
    }
    write_safetensors(path, tensors, metadata, overwrite=overwrite)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write arrays to a .safetensors file, which appears whole or not at all.

    Raises RefusedInput where the file exists and is not to be replaced, MergeFailed where it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not overwrite:
        raise RefusedInput(f"{path}: exists; give another name, or overwrite=True")
    data = safetensors.numpy.save(dict(tensors), dict(metadata) if metadata else None)
    temporary = temporary_beside(target)
    try:
        for leftover in find_leftovers(target):
            remove(leftover)
        staged = StagedFile(temporary, len(data))
        try:
            staged.write(memoryview(data), 0)
            staged.sync()
        finally:
            staged.close()
        publish(temporary, target, overwrite, True)
    except OSError as error:
        raise MergeFailed(f"{path}: cannot be written ({os_reason(error)}); mend that and save again") from error
    finally:
        remove(temporary)


def load(
    path: str | os.PathLike[str],
    *,
    shapes: Mapping[str, Shape] | None = None,
    device: Device | None = None,
    layout: WeightLayout = WeightLayout.CHECKPOINT,
) -> dict[str, LycorisModule]:
    """Read an adapter file or folder: modules by their names in the file, in its order.

    ``shapes`` gives layers' weights as [out, in, *kernel] by those names; others take the shape of their factors'
    delta. Raises RefusedInput for what `lycoris.formats.read_adapter` refuses, and where factors do not make a shape.
    """
    adapter = read_adapter(path)
    given = shapes or {}
    with SafetensorsFile.open(adapter.path) as file:
        return {
            module.stem: _module(file, module, given.get(module.stem), device, layout) for module in adapter.modules
        }


def _module(
    file: SafetensorsFile, found: AdapterModule, shape: Shape | None, device: Device | None, layout: WeightLayout
) -> LycorisModule:
    state: dict[str, DeviceArray | np.ndarray] = {name: file.read(entry) for name, entry in found.factors.items()}
    if found.algorithm == "ia3":
        state["on_input"] = np.array(found.on_input, np.int64)
    if found.rank is not None:
        state["alpha"] = np.array(found.scale * found.rank)
    elif found.scale != 1.0:
        # A Kronecker product of two full halves has no alpha; PEFT scales it all the same.
        state["scalar"] = np.array(found.scale, np.float32)
    if found.dora == "row":  # PEFT keeps a convolution's as [1, out, 1, 1]
        state[DORA] = state[DORA].reshape(-1, *(1 for _ in found.delta_shape[1:]))
    # An embedding's weight is the transpose of its delta, which is what FLAME's layout is.
    layout = WeightLayout.FLAME if found.transposed else layout
    return MODULES[found.algorithm].from_state_dict(state, shape, device=device, layout=layout, name=found.stem)
