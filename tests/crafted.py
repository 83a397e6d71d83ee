"""Small adapter files made by hand, for what no peer writes on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lycoris.checkpoint import SafetensorsFile, TensorEntry
from lycoris.formats import AdapterFile, read_adapter

Tensors = dict[str, np.ndarray]

ALGORITHM_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "locon": {"lora_up.weight": (4, 2), "lora_down.weight": (2, 6)},
    "locon tucker": {"lora_up.weight": (4, 2, 1, 1), "lora_down.weight": (2, 6, 1, 1), "lora_mid.weight": (2, 2, 3, 3)},
    "loha": {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2": (2, 3)},
    "lokr factored": {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3)},
    "full": {"diff": (4, 6)},
    "norm": {"w_norm": (4,)},
    "ia3": {"weight": (4,), "on_input": ()},
}
"""Factors that change a weight of shape (4, 6), or (4, 6, 3, 3) for Tucker, or (4,) for norm."""


def module(stem: str, algorithm: str = "locon", **extra: np.ndarray | float) -> Tensors:
    """Tensors of one module over a (4, 6) weight; `extra` factors are added, numbers as scalars."""
    rng = np.random.default_rng(0)
    tensors = {
        f"{stem}.{name}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in ALGORITHM_SHAPES[algorithm].items()
        if name != "on_input"
    }
    if algorithm == "ia3":
        extra = {"on_input": 0.0, **extra}
    return tensors | {f"{stem}.{name}": np.asarray(value, np.float32) for name, value in extra.items()}


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """`tensors` with the ends of their keys replaced."""
    result = {}
    for key, value in tensors.items():
        end = next((end for end in names if key.endswith(end)), "")
        result[key.removesuffix(end) + names.get(end, "")] = value
    return result


PEFT_SPELLING = {".lora_up.weight": ".lora_B.weight", ".lora_down.weight": ".lora_A.weight"}


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write an adapter file; a folder gets an adapter.safetensors."""
    path = path / "adapter.safetensors" if path.is_dir() else path
    save_file(tensors, path, metadata)
    return path


def peft_config(**options: Any) -> dict[str, Any]:
    """An adapter_config.json for rank 2 LoRA with scale 2, with `options` set."""
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": False, **options}


def save_peft(folder: Path, tensors: Tensors, **options: Any) -> Path:
    """Write a PEFT folder."""
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(**options)))
    return folder


def read(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> AdapterFile:
    """Write an adapter file and read it."""
    return read_adapter(save(folder, tensors, metadata))


def base(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, TensorEntry]:
    """Write a base of random weights; its tensors by name."""
    rng = np.random.default_rng(1)
    path = folder / "base.safetensors"
    save_file({name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}, path)
    with SafetensorsFile.open(path) as file:
        return dict(file.entries)
