"""The `lycoris` command.

Exit status: 0; 1 for a refused input or a failure, with one `error: ...` line on stderr; 2 for wrong usage. The
commands import numba, the plans and the readers when they run, so that `lycoris --help` answers at once.
"""

import click

from lycoris import __version__
from lycoris.cli.info import info_command
from lycoris.cli.inspect import inspect_command
from lycoris.cli.merge import merge_command
from lycoris.cli.output import escape_unencodable

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Merge LyCORIS, kohya and PEFT adapters into safetensors checkpoints."""
    escape_unencodable()


main.add_command(merge_command)
main.add_command(inspect_command)
main.add_command(info_command)
