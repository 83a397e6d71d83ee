"""float64 reference of merging: what a merged tensor is exactly, from the factors as they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lycoris.checkpoint import TensorEntry
from lycoris.dtype import DTYPES
from lycoris.formats import AdapterModule, MatchedModule
from lycoris.formats.base_index import Place


def load(entry: TensorEntry) -> np.ndarray:
    """A tensor of a file, in its stored type."""
    values = np.fromfile(entry.path, DTYPES[entry.dtype].numpy, count=entry.count, offset=entry.start)
    return values.reshape(entry.shape)


def load64(entry: TensorEntry) -> np.ndarray:
    return load(entry).astype(np.float64)


def tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sum_ij core[i, j, ...] a[i, p] b[j, q] -> [p, q, ...]."""
    return np.einsum("ij...,ip,jq->pq...", core, a, b)


def matrix(factor: np.ndarray) -> np.ndarray:
    return factor.reshape(factor.shape[0], -1)


def delta64(algorithm: str, factors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The unscaled delta, float64, in the shape that the factors make."""
    if algorithm == "locon":
        up, down = factors["lora_up.weight"], factors["lora_down.weight"]
        if "lora_mid.weight" in factors:
            return tucker(factors["lora_mid.weight"], matrix(up).T, matrix(down))
        return np.tensordot(matrix(up), down, 1)
    if algorithm == "loha":
        a1, b1, a2, b2 = (factors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if "hada_t1" in factors:
            return tucker(factors["hada_t1"], a1, b1) * tucker(factors["hada_t2"], a2, b2)
        return (a1 @ b1) * (a2 @ b2)
    if algorithm == "lokr":
        w1 = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
        if "lokr_w2" in factors:
            w2 = factors["lokr_w2"]
        elif "lokr_t2" in factors:
            w2 = tucker(factors["lokr_t2"], factors["lokr_w2_a"], factors["lokr_w2_b"])
        else:
            w2 = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
        product = np.einsum("ab,cd...->acbd...", matrix(w1), w2)
        return product.reshape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:])
    return factors["diff" if algorithm == "full" else "w_norm"]


def change64(module: AdapterModule, weight: np.ndarray) -> np.ndarray:
    """What the module adds to float64 `weight` at strength 1."""
    factors = {name: load64(entry) for name, entry in module.factors.items()}
    if module.algorithm == "ia3":
        axis = 1 if module.on_input else 0
        return weight * factors["weight"].reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    delta = module.scale * delta64(module.algorithm, factors)
    delta = delta.T if module.transposed else delta.reshape(weight.shape)
    if module.dora is None:
        return delta
    merged = weight + delta
    kept = 0 if module.dora == "row" else 1
    others = tuple(axis for axis in range(weight.ndim) if axis != kept)
    norm = np.sqrt((merged**2).sum(axis=others, keepdims=True)) + 2.0**-23
    return merged * (factors["dora_scale"].reshape(norm.shape) / norm) - weight


def expected_merge(
    base: Mapping[str, np.ndarray], modules: Iterable[MatchedModule], strengths: Iterable[float]
) -> dict[str, np.ndarray]:
    """Every base tensor that `modules` change, exact in float64: W + sum of strength * change.

    Args:
        base: Tensors by name, in any float type.
        modules: Of one or more adapters.
        strengths: One for each of them.
    """
    merged: dict[str, np.ndarray] = {}
    for row, strength in zip(modules, strengths, strict=True):
        change = change64(row.module, gathered(base, row.weight))
        places = [(row.weight, change)]
        if row.bias is not None:
            places.append((row.bias, load64(row.module.bias)))
        for place, added in places:
            added = added.reshape(place.shape)
            for run in place.runs:
                tensor = merged.setdefault(run.tensor, base[run.tensor].astype(np.float64))
                np.atleast_1d(tensor)[run.first : run.first + run.count] += strength * added[: run.count]
                added = added[run.count :]
    return merged


def gathered(base: Mapping[str, np.ndarray], place: Place) -> np.ndarray:
    """The rows of `place`, in float64."""
    runs = [np.atleast_1d(base[run.tensor])[run.first : run.first + run.count] for run in place.runs]
    return np.concatenate(runs).astype(np.float64).reshape(place.shape)
