"""`lycoris inspect`: what an adapter or a checkpoint holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lycoris.cli.arguments import PathType
from lycoris.cli.output import (
    byte_count,
    counted,
    dimensions,
    print_facts,
    print_json,
    print_table,
    reported_errors,
    stdout_console,
)


@click.command("inspect")
@click.argument("path", metavar="FILE_OR_FOLDER", type=PathType())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(path: str, as_json: bool) -> None:
    """Show what an adapter or a checkpoint holds.

    An adapter: format, algorithms, ranks, alphas, dtypes, module by module. A checkpoint: names, shapes, dtypes.
    """
    with reported_errors():
        found = describe(Path(path))
        if as_json:
            print_json(found)
        elif found["kind"] == "adapter":
            print_adapter(found)
        else:
            print_checkpoint(found)


def describe(path: Path) -> dict[str, Any]:
    """What `path` holds, in types that JSON has; `kind` is "adapter" or "checkpoint".

    Raises:
        RefusedInput: neither can be read there.
    """
    from lycoris.checkpoint import Checkpoint
    from lycoris.formats import describe_adapter, read_adapter
    from lycoris.formats.keys import holds_adapter
    from lycoris.formats.peft import CONFIG_NAME

    if not (path / CONFIG_NAME).is_file():
        with Checkpoint.open(path) as checkpoint:
            if not holds_adapter(checkpoint.tensors):
                return {"kind": "checkpoint", **describe_checkpoint(checkpoint)}
    return {"kind": "adapter", **describe_adapter(read_adapter(path))}


def describe_checkpoint(checkpoint: Any) -> dict[str, Any]:
    """Totals of an open `Checkpoint`, then tensor by tensor."""
    entries = checkpoint.tensors.values()
    return {
        "path": str(checkpoint.path),
        "files": list(checkpoint.shard_names),
        "dtypes": dict(Counter(entry.dtype for entry in entries)),
        "parameters": sum(entry.count for entry in entries),
        "bytes": checkpoint.data_bytes,
        "tensors": [
            {"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape), "file": entry.file}
            for entry in entries
        ],
    }


def print_adapter(adapter: Mapping[str, Any]) -> None:
    """An adapter's totals, then a row for each module."""
    console = stdout_console()
    print_facts(
        console,
        [
            ("adapter", adapter["path"]),
            ("format", adapter["format"]),
            ("components", counted(adapter["components"])),
            ("algorithms", counted(adapter["algorithms"])),
            ("with DoRA", str(adapter["dora"] or "")),
            ("ranks", ", ".join(map(str, adapter["ranks"]))),
            ("alphas", ", ".join(f"{alpha:g}" for alpha in adapter["alphas"])),
            ("dtypes", counted(adapter["dtypes"])),
        ],
    )
    console.print()
    header = ("module", "algorithm", "rank", "alpha", "scale", "delta", "dtype")
    print_table(console, header, map(_module_row, adapter["modules"]))


def _module_row(module: Mapping[str, Any]) -> tuple[str, ...]:
    rank, alpha, shape = module["rank"], module["alpha"], module["delta_shape"]
    return (
        module["name"],
        module["algorithm"] + (" + DoRA" if module["dora"] else ""),
        "" if rank is None else str(rank),
        "" if alpha is None else f"{alpha:g}",
        f"{module['scale']:g}",
        "" if shape is None else dimensions(shape),
        ", ".join(sorted({factor["dtype"] for factor in module["factors"].values()})),
    )


def print_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    """A checkpoint's totals, then a row for each tensor."""
    console = stdout_console()
    files, tensors = checkpoint["files"], checkpoint["tensors"]
    print_facts(
        console,
        [
            ("checkpoint", checkpoint["path"]),
            ("files", f"{len(files)} shards" if len(files) > 1 else files[0]),
            ("tensors", str(len(tensors))),
            ("parameters", f"{checkpoint['parameters']:,}"),
            ("size", byte_count(checkpoint["bytes"])),
            ("dtypes", counted(checkpoint["dtypes"])),
        ],
    )
    console.print()
    rows = ((tensor["name"], dimensions(tensor["shape"]), tensor["dtype"]) for tensor in tensors)
    print_table(console, ("tensor", "shape", "dtype"), rows)
