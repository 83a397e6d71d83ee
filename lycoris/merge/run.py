"""The merge from end to end: everything is checked before the first byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from lycoris.checkpoint import Checkpoint, CheckpointWriter, SafetensorsFile, interruptible
from lycoris.dtype import MERGEABLE, OPTIONS
from lycoris.errors import MergeFailed, RefusedInput
from lycoris.formats import match, read_adapter
from lycoris.merge.changes import LoadedAdapter, by_place, collect_changes
from lycoris.merge.clock import Clock
from lycoris.merge.compute import choose_kernels
from lycoris.merge.crew import Crew
from lycoris.merge.estimate import refuse_long_simulation
from lycoris.merge.factors import Factor
from lycoris.merge.jobs import Job, make_jobs
from lycoris.merge.options import AdapterInput, MergeOptions, MergeReport
from lycoris.merge.pipeline import Pipeline, ProgressCallback
from plans.core import Device, DeviceError, Unsupported

_SCANNERS = 8


@dataclass(frozen=True, slots=True)
class Work:
    """A merge, planned.

    Attributes:
        adapters: In the order given.
        jobs: What is computed.
        factors: What the jobs read.
        idle: Factors whose strength is 0: they change nothing, but have to be sound like all others.
        changed: How many tensors an adapter changes.
    """

    adapters: tuple[LoadedAdapter, ...]
    jobs: tuple[Job, ...]
    factors: tuple[Factor, ...]
    idle: tuple[Factor, ...]
    changed: int


def merge(options: MergeOptions, progress: ProgressCallback | None = None) -> MergeReport:
    """`base + sum of strength * delta -> output`: every value exact and rounded once, all others byte for byte.

    The output appears whole or not at all. In the main thread, SIGINT, SIGTERM and SIGHUP unwind the merge.

    Args:
        options: What to merge into what.
        progress: Called with bytes written and bytes in all, by one thread at a time, lastly with both equal.

    Raises:
        RefusedInput: an input, a combination of inputs or an option cannot be used.
        MergeFailed: the disk is full, the device fails or has too little memory, an input changed meanwhile, a
            signal came. No output is left behind.
    """
    options.check()
    try:
        return _merge(options, progress)
    except DeviceError as error:
        raise MergeFailed(str(error)) from error


def _merge(options: MergeOptions, progress: ProgressCallback | None) -> MergeReport:
    clock = Clock()
    with interruptible(), ExitStack() as opened:
        # A GPU takes a third of a second to open; headers are read meanwhile.
        opening = opened.enter_context(ThreadPoolExecutor(1)).submit(Device.open, options.device)
        base = opened.enter_context(Checkpoint.open(options.base))
        adapters = [_load(base, adapter, options.allow_unmatched, opened) for adapter in options.adapters]
        work = _plan(base, adapters, options.dtype)
        writer = _writer(base, work, options)
        clock.end("plan")
        device = _opened(opening)
        clock.end("device")
        if device.is_simulator:
            refuse_long_simulation(work.jobs)
        kernels = choose_kernels(work.jobs, device)
        _scan([*work.idle, *work.factors] if options.dry_run else work.idle)
        if not options.dry_run:
            pipeline = Pipeline(device, base, writer, work.jobs, progress)
            clock.end("kernels")
            _write(pipeline, writer, work, clock)
        return _report(options, base, writer, work, kernels, device, clock)


def _opened(opening: Future[Device]) -> Device:
    try:
        device = opening.result()
    except Unsupported as error:
        raise RefusedInput(str(error)) from error
    device.make_current()
    return device


def _load(base: Checkpoint, given: AdapterInput, allow_unmatched: bool, opened: ExitStack) -> LoadedAdapter:
    adapter = read_adapter(given.path)
    matching = match(adapter, base.tensors, allow_unmatched=allow_unmatched)
    file = opened.enter_context(SafetensorsFile.open(adapter.path))
    for row in matching.matched:
        if any(file.entries.get(entry.name) != entry for entry in row.module.factors.values()):
            raise MergeFailed(
                f"{adapter.path}: changed while it was read; run it again when nothing writes to the file"
            )
    return LoadedAdapter(adapter.path, file, matching, given.strength)


def _plan(base: Checkpoint, adapters: Sequence[LoadedAdapter], dtype: str) -> Work:
    changes = collect_changes(adapters)
    active = by_place([change for change in changes if not change.is_idle], base.tensors)
    jobs = make_jobs(base.tensors, active, dtype)
    idle = [factor for change in changes if change.is_idle for factor in change.factors.values()]
    return Work(
        adapters=tuple(adapters),
        jobs=tuple(jobs),
        factors=tuple(factor for job in jobs for factor in job.operands),
        idle=tuple(idle),
        changed=len({name for job in jobs if job.descriptor is not None for name in job.tensors}),
    )


def _writer(base: Checkpoint, work: Work, options: MergeOptions) -> CheckpointWriter:
    """The output, once it has proved possible; nothing is written yet."""
    dtypes = {}
    if options.dtype in OPTIONS:
        dtypes = {name: OPTIONS[options.dtype] for name, entry in base.tensors.items() if entry.dtype in MERGEABLE}
    inputs = [*(given.path for given in options.adapters), *(adapter.path for adapter in work.adapters)]
    writer = CheckpointWriter(
        base, options.output, dtypes=dtypes, overwrite=options.overwrite, sync=options.sync, inputs=inputs
    )
    writer.check_space()
    return writer


def _scan(factors: Sequence[Factor]) -> None:
    """Check factors that no pipeline will see."""
    with Crew({"scanner": _SCANNERS}, lambda: None) as crew:
        crew.finish([crew.submit("scanner", factor.scan) for factor in factors])


def _write(pipeline: Pipeline, writer: CheckpointWriter, work: Work, clock: Clock) -> None:
    with writer:
        pipeline.run()
        clock.end("stream")
        for adapter in work.adapters:
            adapter.file.check_unchanged()
        writer.commit()
    clock.end("publish")


def _report(
    options: MergeOptions,
    base: Checkpoint,
    writer: CheckpointWriter,
    work: Work,
    kernels: dict[str, int],
    device: Device,
    clock: Clock,
) -> MergeReport:
    rows = [row for adapter in work.adapters for row in adapter.matching.matched]
    unmatched: Counter[str] = Counter()
    for adapter in work.adapters:
        for component, stems in adapter.matching.absent.items():
            unmatched[component] += len(stems)
        for component, stems in adapter.matching.unmatched.items():
            unmatched[f"unmatched in {component or 'the model'}"] += len(stems)
    read = sum(factor.nbytes for factor in (*work.factors, *work.idle))
    return MergeReport(
        device=device.name,
        modules=dict(Counter(row.module.algorithm for row in rows)),
        ranks=dict(sorted(Counter(row.module.rank for row in rows if row.module.rank is not None).items())),
        tensors=len(base.tensors),
        tensors_changed=work.changed,
        unmatched=dict(unmatched),
        bytes_read=read if options.dry_run else read + base.data_bytes,
        bytes_written=0 if options.dry_run else sum(entry.nbytes for entry in writer.tensors.values()),
        seconds=clock.seconds,
        phases=clock.phases,
        output=str(options.output),
        dry_run=options.dry_run,
        skus=kernels,
    )
