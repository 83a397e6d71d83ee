"""How long the simulator would take: it runs kernels as Python, so large merges are refused before they begin."""

from __future__ import annotations

from collections.abc import Iterable

from lycoris.errors import RefusedInput
from lycoris.merge.jobs import Job

LIMIT_SECONDS = 600.0

# Measured for one value on one core: its load, rounding and store, what each summed term of a source adds, and a cast.
_VALUE_SECONDS = 15e-6
_TERM_SECONDS = 1.5e-6
_CAST_SECONDS = 6e-6
_INSTALL = 'pip install "lycoris-numba[cu13]"'


def simulator_seconds(jobs: Iterable[Job]) -> float:
    """An estimate of what the simulator takes for `jobs`."""
    return sum(job.count * _seconds_a_value(job) for job in jobs)


def _seconds_a_value(job: Job) -> float:
    if job.descriptor is None:
        return _CAST_SECONDS
    terms = sum(source.depth for source in job.descriptor.sources)
    # DoRA evaluates its sources twice: for the norms, and for the result.
    return (_VALUE_SECONDS + terms * _TERM_SECONDS) * (2 if job.descriptor.is_dora else 1)


def refuse_long_simulation(jobs: Iterable[Job]) -> None:
    """Refuse work that the simulator would sit at for more than `LIMIT_SECONDS`.

    Raises:
        RefusedInput: with the estimate, and what to install.
    """
    jobs = list(jobs)
    seconds = simulator_seconds(jobs)
    if seconds > LIMIT_SECONDS:
        values = sum(job.count for job in jobs)
        raise RefusedInput(
            f"no GPU in use: merging {values} values in Numba's CUDA simulator would take about "
            f"{duration(seconds)} (at most {duration(LIMIT_SECONDS)} are begun); run it on a machine with an NVIDIA "
            f"GPU and its driver, after {_INSTALL}"
        )


def duration(seconds: float) -> str:
    """A time in a unit fit to read."""
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"
