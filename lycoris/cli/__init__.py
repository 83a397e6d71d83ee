"""The `lycoris` command.

Exit status: 0; 1 for a refused input or a failure, with one `error: ...` line on stderr; 2 for wrong usage. A command
is imported when it is asked for, and imports numba, the plans and the readers when it runs: `lycoris --help` answers at
once, and a merge wakes the driver before it loads anything.
"""

from __future__ import annotations

import importlib

import click

from lycoris import __version__
from lycoris.cli.output import escape_unencodable

__all__ = ["main"]

_COMMANDS = ("merge", "inspect", "info")
"""Each is `<name>_command` in the module of its name."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return getattr(importlib.import_module(f"lycoris.cli.{cmd_name}"), f"{cmd_name}_command")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Merge LyCORIS, kohya and PEFT adapters into safetensors checkpoints."""
    escape_unencodable()
