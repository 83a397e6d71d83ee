"""`lycoris merge`: adapters into a checkpoint."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lycoris.cli.arguments import AdapterArgument, AdapterType, DeviceType, PathType
from lycoris.cli.output import (
    byte_count,
    counted,
    is_terminal,
    print_facts,
    print_json,
    reported_errors,
    stderr_console,
    stdout_console,
)
from lycoris.dtype import OPTIONS
from plans.wake import wake_driver

if TYPE_CHECKING:
    from lycoris.merge import MergeReport

SIMULATOR_REMARK = "note: no GPU in use; Numba's CUDA simulator is slow, for small files only"


@click.command("merge")
@click.argument("base", type=PathType())
@click.argument("adapters", metavar="ADAPTER[=STRENGTH]...", nargs=-1, required=True, type=AdapterType())
@click.option("--output", metavar="OUT", required=True, type=PathType(), help="File or folder to write.")
@click.option("--device", type=DeviceType(), default="auto", show_default=True, help="Where to compute.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", *sorted(OPTIONS)]),
    default="keep",
    show_default=True,
    help="Dtype of the output's bf16, fp16 and fp32 tensors.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--sync/--no-sync",
    default=True,
    show_default=True,
    help="Have OUT on disk before it gets its name. With --no-sync OUT is as durable as a file that cp has written: "
    "whole or absent whatever happens to this process, but not yet safe from a loss of power.",
)
@click.option("--allow-unmatched", is_flag=True, help="Leave out modules that match nothing in BASE.")
@click.option("--dry-run", is_flag=True, help="Check everything and report; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def merge_command(
    base: str,
    adapters: tuple[AdapterArgument, ...],
    output: str,
    device: str,
    dtype: str,
    overwrite: bool,
    sync: bool,
    allow_unmatched: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge adapters into a checkpoint.

    BASE is a .safetensors file, an index.json with shards, or a folder that holds either; OUT gets the same shape.
    Each ADAPTER is a .safetensors file or a PEFT folder, and STRENGTH is 1 unless given.
    """
    with reported_errors():
        if device == "simulator":
            os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # numba reads it once, when it is imported
        os.environ.setdefault("LYCORIS_QUIET", "1")  # the remark comes below: beside an error it would hide it
        wake_driver(device)
        with kept_imports():
            from lycoris.merge import AdapterInput, MergeOptions, merge
            from plans.core.device import Device

        options = MergeOptions(
            base=Path(base),
            adapters=tuple(AdapterInput(path=path, strength=strength) for path, strength in adapters),
            output=output,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            sync=sync,
            allow_unmatched=allow_unmatched,
            dry_run=dry_run,
        )
        with progress_bar() as progress:
            report = merge(options, progress)
        if device == "auto" and Device.open(device).is_simulator:
            click.echo(SIMULATOR_REMARK, err=True)
        if as_json:
            print_json(asdict(report))
        else:
            print_facts(stdout_console(), report_facts(report))


@contextmanager
def kept_imports() -> Iterator[None]:
    """Take what is imported within for what it is, there to stay: no search for garbage looks at it, now or at the end.

    A hundred thousand objects: they cost a fifth of their import's time, and as much again when the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A function of (bytes done, bytes in all) that draws a bar on stderr; None where that is no terminal."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr_console(),
        transient=True,
    )
    task = bar.add_task("merge", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report_facts(report: MergeReport) -> list[tuple[str, str]]:
    """The table at the end of a merge."""
    seconds = f"{report.seconds:.3g} s"
    written = f"{byte_count(report.bytes_written)} in {seconds}"
    if report.seconds > 0:
        written += f", {report.bytes_written / report.seconds / 1e9:.3g} GB/s"
    return [
        ("modules", counted(report.modules)),
        ("ranks", ", ".join(f"{rank} in {count}" for rank, count in sorted(report.ranks.items()))),
        ("tensors changed", f"{report.tensors_changed} of {report.tensors}"),
        ("left out", counted(report.unmatched)),
        ("device", report.device),
        ("kernels", counted(report.skus)),
        ("time", ", ".join(f"{phase} {length:.2f} s" for phase, length in report.phases.items())),
        ("written", f"nothing (dry run), {seconds}" if report.dry_run else written),
        ("output", report.output),
    ]
