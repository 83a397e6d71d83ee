"""Adapter files: headers, scalars and configuration become modules; factors stay in the file until they are merged."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lycoris.checkpoint import SafetensorsFile, TensorEntry
from lycoris.dtype import DTYPES, MERGEABLE
from lycoris.errors import RefusedInput
from lycoris.formats.keys import (
    ALGORITHMS,
    DORA,
    EMBEDDING_PREFIX,
    MAGNITUDE_PREFIX,
    PROCESSOR_PREFIX,
    SCALARS,
    SPELLINGS,
    algorithm_of,
    holds_adapter,
    is_whole_weight,
    parse_key,
)
from lycoris.formats.names import ModuleName, split_stem
from lycoris.formats.peft import CONFIG_NAME, PeftConfig, read_config, read_metadata
from lycoris.formats.shapes import Axis, Shape, delta_shape, dora_axis, rank_of

PEFT_WEIGHTS = "adapter_model.safetensors"
_OWN_CONFIG = f"put the {CONFIG_NAME} that it was saved with beside it"


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """What an adapter does to one layer.

    The merged weight is `W + strength * scale * delta(factors)`; with `dora`, norms are replaced after that.

    Attributes:
        stem: The module's name in the file.
        path: The same without the format's prefix, dotted or underscored.
        component: Part of the pipeline that the name says it belongs to, or None.
        algorithm: A key of `lycoris.formats.keys.ALGORITHMS`.
        factors: Canonical (LyCORIS) name -> tensor in the file; scalars are read and not among them.
        rank: By the stored shapes; None where nothing is factored.
        alpha: As the file or its configuration says; None where neither does.
        scale: Factor on the delta at strength 1, a trained `scalar` included.
        dora: Norms that `dora_scale` replaces: of output rows or of input columns; None without DoRA.
        on_input: IA3 only: scales input columns, not output rows.
        transposed: The base's weight is [in, out], the transpose of the delta (embeddings, GPT-2's Conv1D).
    """

    stem: str
    path: str
    component: str | None
    algorithm: str
    factors: Mapping[str, TensorEntry]
    rank: int | None
    alpha: float | None
    scale: float
    dora: Axis | None = None
    on_input: bool = False
    transposed: bool = False

    @property
    def bias(self) -> TensorEntry | None:
        """The bias difference (diff_b, b_norm); it is multiplied by the strength alone."""
        return self.factors.get("diff_b", self.factors.get("b_norm"))

    @property
    def delta_shape(self) -> Shape:
        """Shape of the delta as the factors make it."""
        return delta_shape(self.algorithm, self.factors, self.stem)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter: the safetensors file, the format most of its names are in, and its modules in the file's order."""

    path: Path
    format: str
    modules: tuple[AdapterModule, ...]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A factor as the file has it: end of its key, and tensor."""

    spelling: str
    entry: TensorEntry


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read what an adapter file says; of its data only scalars.

    Args:
        path: A .safetensors file of LyCORIS, kohya, PEFT (with its adapter_config.json beside it), diffusers or
            ComfyUI; or a folder with adapter_config.json and adapter_model.safetensors, or with one .safetensors file.

    Raises:
        RefusedInput: no such file, not an adapter, an algorithm or option that is not supported, a missing or
            inconsistent factor. File, module and key are named.
    """
    weights = _find_weights(Path(path))
    with SafetensorsFile.open(weights) as file:
        modules = _group(file.entries, weights)
        names = {stem: _split(stem, factors) for stem, factors in modules.items()}
        configs = _configs(file, list(names.values()))
        built = tuple(
            _build(file, names[stem], stem, factors, _config_for(stem, configs)) for stem, factors in modules.items()
        )
    formats = Counter(name.format.name for name in names.values())
    return AdapterFile(weights, formats.most_common(1)[0][0], built)


def _find_weights(path: Path) -> Path:
    if not os.path.isdir(path):
        return path
    if os.path.isfile(path / CONFIG_NAME):
        if not os.path.isfile(path / PEFT_WEIGHTS):
            raise RefusedInput(
                f"{path}: has {CONFIG_NAME} but no {PEFT_WEIGHTS}; save the adapter with safe_serialization=True"
            )
        return path / PEFT_WEIGHTS
    found = sorted(file for file in path.glob("*.safetensors") if os.path.isfile(file) and file.name[0] != ".")
    if len(found) != 1:
        listed = f" ({', '.join(file.name for file in found[:3])})" if found else ""
        raise RefusedInput(
            f"{path}: holds {len(found)} .safetensors files{listed} and no {CONFIG_NAME}; "
            "give the adapter's file, or a folder with one"
        )
    return found[0]


def _group(entries: Mapping[str, TensorEntry], path: Path) -> dict[str, dict[str, _Stored]]:
    """The file's tensors by module and by canonical factor name."""
    modules: dict[str, dict[str, _Stored]] = {}
    if not holds_adapter(entries) and any(is_whole_weight(name) for name in entries):
        raise RefusedInput(
            f"{path}: holds whole weights ({', '.join(list(entries)[:3])}), as a checkpoint or PEFT's modules_to_save, "
            f"and no factors of one of {', '.join(ALGORITHMS)}; give the adapter's own file"
        )
    for name, entry in entries.items():
        key = parse_key(name, len(entry.shape), str(path))
        factor = SPELLINGS[key.spelling]
        factors = modules.setdefault(key.stem, {})
        if factor in factors:
            raise RefusedInput(
                f"{path}: {factors[factor].entry.name!r} and {name!r} are the same factor, wanted one; remove the other"
            )
        if factor not in SCALARS and entry.dtype not in MERGEABLE:
            wanted = ", ".join(sorted(MERGEABLE))
            raise RefusedInput(
                f"{path}: key {name!r} has dtype {entry.dtype}, wanted one of {wanted}; convert it first"
            )
        factors[factor] = _Stored(key.spelling, entry)
    if not modules:
        raise RefusedInput(f"{path}: holds no tensors, wanted an adapter; give another file")
    return modules


def _split(stem: str, factors: Mapping[str, _Stored]) -> ModuleName:
    of_processor = any(stored.spelling.startswith(PROCESSOR_PREFIX) for stored in factors.values())
    return split_stem(stem, of_processor=of_processor)


def _configs(file: SafetensorsFile, names: list[ModuleName]) -> dict[str, PeftConfig]:
    """PEFT configurations that hold for the file's modules, by the prefix of the modules' names."""
    configs = read_metadata(file.metadata, file.path)
    beside = file.path.with_name(CONFIG_NAME)
    wanted = file.path.name == PEFT_WEIGHTS or any(name.format.needs_config for name in names)
    if wanted and os.path.isfile(beside):
        configs[""] = read_config(beside)
    return configs


def _config_for(stem: str, configs: Mapping[str, PeftConfig]) -> PeftConfig | None:
    prefixes = [prefix for prefix in configs if stem.startswith(prefix)]
    return configs[max(prefixes, key=len)] if prefixes else None


def _build(
    file: SafetensorsFile,
    name: ModuleName,
    stem: str,
    stored: Mapping[str, _Stored],
    config: PeftConfig | None,
) -> AdapterModule:
    where = f"{file.path}: module {stem!r}"
    algorithm = algorithm_of(stored, where).name
    scalars = {key: _read_scalar(file, stored[key].entry) for key in SCALARS & stored.keys()}
    factors = {key: value.entry for key, value in stored.items() if key not in SCALARS}
    rank = rank_of(algorithm, factors)
    shape = delta_shape(algorithm, factors, where)
    alpha = scalars.get("alpha")
    if config is not None:
        _check_config(config, name.path, algorithm, rank, stored, where)
        alpha, scale = config.alpha_of(name.path), config.scale_of(name.path)
    elif name.format.needs_config and alpha is None:
        raise RefusedInput(f"{where}: its scale is in {CONFIG_NAME}, which is not beside the file; put it there")
    else:
        scale = lycoris_scale(rank, alpha)
    scale *= scalars.get("scalar", 1.0)
    if not math.isfinite(scale):
        raise RefusedInput(
            f"{where}: alpha and scalar make the scale {scale}, wanted a finite number; give a sound adapter"
        )
    dora = _dora(stored, shape, where)
    transposed = any(value.spelling.startswith(EMBEDDING_PREFIX) for value in stored.values())
    transposed |= config is not None and config.fan_in_fan_out
    if dora and transposed:
        raise RefusedInput(
            f"{where}: DoRA over a transposed weight (embedding or fan_in_fan_out) is not supported; merge it with PEFT"
        )
    return AdapterModule(
        stem=stem,
        path=name.path,
        component=name.component,
        algorithm=algorithm,
        factors=factors,
        rank=rank,
        alpha=alpha,
        scale=scale,
        dora=dora,
        on_input=bool(scalars.get("on_input", 0.0)),
        transposed=transposed,
    )


def lycoris_scale(rank: int | None, alpha: float | None) -> float:
    """`alpha / rank` as LyCORIS reads it: 1 where nothing is factored (rank None), and where alpha is missing or 0."""
    if rank is None or not alpha:
        return 1.0
    return alpha / rank


def _check_config(
    config: PeftConfig, path: str, algorithm: str, rank: int | None, stored: Mapping[str, _Stored], where: str
) -> None:
    """Refuse a module that its configuration contradicts."""
    if algorithm != config.algorithm:
        raise RefusedInput(f"{where}: holds {algorithm}, {config.source} says {config.algorithm}; {_OWN_CONFIG}")
    if "alpha" in stored:
        raise RefusedInput(f"{where}: has an alpha, and {config.source} has another; remove one of the two")
    if rank is not None and rank != config.rank_of(path):
        raise RefusedInput(
            f"{where}: its factors have rank {rank}, {config.source} says {config.rank_of(path)}; {_OWN_CONFIG}"
        )
    if config.dora != (DORA in stored):
        has = "a" if DORA in stored else "no"
        raise RefusedInput(
            f"{where}: has {has} magnitude vector, {config.source} says use_dora is {config.dora}; {_OWN_CONFIG}"
        )


def _dora(stored: Mapping[str, _Stored], delta: Shape, where: str) -> Axis | None:
    """The norms that a magnitude vector replaces."""
    if DORA not in stored:
        return None
    if stored[DORA].spelling.startswith(MAGNITUDE_PREFIX):
        return "row"
    return dora_axis(stored[DORA].entry.shape, delta, where)


def _read_scalar(file: SafetensorsFile, entry: TensorEntry) -> float:
    dtype = DTYPES[entry.dtype]
    if entry.count != 1 or dtype.packed or dtype.numpy.kind == "c":
        raise RefusedInput(
            f"{file.path}: key {entry.name!r} is {entry.dtype} of shape {list(entry.shape)}, wanted one number; "
            "give a sound adapter"
        )
    value = float(file.read(entry).astype(np.float64).reshape(-1)[0])
    if not math.isfinite(value):
        raise RefusedInput(f"{file.path}: key {entry.name!r} is {value}, wanted a finite number; give a sound adapter")
    return value
