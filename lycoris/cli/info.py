"""`lycoris info`: what this machine offers, and which kernels would run on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from lycoris.cli.output import byte_count, print_facts, print_table, reported_errors, stdout_console


@click.command("info")
def info_command() -> None:
    """Show device, libraries and kernels in use."""
    with reported_errors():
        from plans.catalogue import catalogue
        from plans.core.device import describe

        facts, examples = device_facts(describe()), catalogue()
        console = stdout_console()
        print_facts(console, facts)
        console.print()
        print_table(console, ("plan", "for example", "SKU"), examples)


def device_facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The device, its driver and the libraries' versions, a row each."""
    return [
        ("device", found["device"]),
        ("compute capability", found["compute_capability"]),
        ("multiprocessors", str(found.get("multiprocessors", ""))),
        ("memory", byte_count(found["memory_bytes"])),
        ("driver", found.get("driver", "none")),
        *found["libraries"].items(),
    ]
