"""What the commands print: results on stdout, progress and errors on stderr.

rich is imported where something is drawn: a tenth of a second that `--json` and errors do without.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, TextIO

import click

from lycoris.errors import LycorisError

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 1 << 16
"""Wider than any row: a pipe has no width of its own, and names must reach it whole."""


class CommandError(click.ClickException):
    """A refusal or a failure: `error: ...` in one line on stderr, exit status 1."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line. Names that come out of files may hold anything: what cannot be printed is escaped."""
        click.echo(f"error: {printable(self.format_message())}", file=file, err=file is None)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn what the library, the plans or the system refuse, and Ctrl-C, into a CommandError.

    A closed pipe passes: click ends quietly on it.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise CommandError("interrupted; nothing was left half written, run the command again") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        raise CommandError(f"{place}{error.strerror or error}; mend that and run the command again") from error
    except (LycorisError, *_plan_errors()) as error:
        raise CommandError(str(error)) from error


def _plan_errors() -> tuple[type[Exception], ...]:
    """`PlanError`, once plans are loaded: numba is not loaded only to name the class."""
    errors = sys.modules.get("plans.core.errors")
    return () if errors is None else (errors.PlanError,)


def printable(text: str) -> str:
    """`text` with line breaks, terminal escapes and whatever else cannot be printed as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(result, indent=2, allow_nan=False))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody reads along; Python has None for a stream that was closed before the command began."""
    return stream is not None and stream.isatty()


def escape_unencodable() -> None:
    """Have both streams escape what their encoding lacks: a name of a file or a tensor may hold any character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stdout_console() -> Console:
    """For results: as wide as the terminal, or as wide as the text where there is none."""
    from rich.console import Console

    width = None if is_terminal(sys.stdout) else PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def stderr_console() -> Console:
    """For progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of strings. A terminal gets long cells folded, never cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Two columns, name and value; a fact without a value is left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(name, Text(printable(value)))
    console.print(table)


def counted(counts: Mapping[str, int]) -> str:
    """`{"lokr": 40, "locon": 9}` as `40 lokr, 9 locon`."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def dimensions(shape: Iterable[int]) -> str:
    """`(1280, 640, 3, 3)` as `1280x640x3x3`; a scalar as `scalar`."""
    return "x".join(map(str, shape)) or "scalar"


def byte_count(count: int) -> str:
    """A number of bytes, fit to read: in powers of ten, as disks are sold and GB/s are measured."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.4g} {unit}"
