"""An adapter as plain data, for `lycoris inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lycoris.formats.adapter import AdapterFile, AdapterModule


def describe_adapter(adapter: AdapterFile) -> dict[str, Any]:
    """What an adapter says, in types that JSON has: totals, then module by module in the file's order."""
    modules = adapter.modules
    return {
        "path": str(adapter.path),
        "format": adapter.format,
        "components": dict(Counter(module.component or "model" for module in modules)),
        "algorithms": dict(Counter(module.algorithm for module in modules)),
        "dora": sum(module.dora is not None for module in modules),
        "ranks": sorted({module.rank for module in modules if module.rank is not None}),
        "alphas": sorted({module.alpha for module in modules if module.alpha is not None}),
        "dtypes": dict(Counter(entry.dtype for module in modules for entry in module.factors.values())),
        "modules": [_describe_module(module) for module in modules],
    }


def _describe_module(module: AdapterModule) -> dict[str, Any]:
    return {
        "name": module.stem,
        "component": module.component,
        "algorithm": module.algorithm,
        "rank": module.rank,
        "alpha": module.alpha,
        "scale": module.scale,
        "dora": module.dora,
        "on_input": module.on_input if module.algorithm == "ia3" else None,
        "transposed": module.transposed,
        "delta_shape": list(module.delta_shape) if module.algorithm != "ia3" else None,
        "factors": {name: {"dtype": entry.dtype, "shape": list(entry.shape)} for name, entry in module.factors.items()},
    }
