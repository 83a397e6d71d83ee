"""Types of command-line arguments: an adapter with its strength, a device. Wrong usage exits with status 2."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import click

DEVICE_PATTERN = re.compile(r"auto|simulator|cuda:\d+", re.ASCII)


class AdapterArgument(NamedTuple):
    """`ADAPTER[=STRENGTH]` as given: a path, not yet looked at, and a finite strength."""

    path: Path
    strength: float


class AdapterType(click.ParamType):
    """`ADAPTER[=STRENGTH]`. A path may itself contain '=': what exists as a whole is a path as a whole."""

    name = "adapter[=strength]"

    def convert(
        self, value: str | AdapterArgument, param: click.Parameter | None, ctx: click.Context | None
    ) -> AdapterArgument:
        """Split at the last '='; fail as wrong usage where what follows it is no finite number."""
        if isinstance(value, AdapterArgument):
            return value
        path, equals, strength = value.rpartition("=")
        if not value:
            self.fail("the path of an adapter is empty; give ADAPTER or ADAPTER=STRENGTH", param, ctx)
        if not equals or Path(value).exists():
            return AdapterArgument(Path(value), 1.0)
        if not path:
            self.fail(f"{value!r} names no adapter; give ADAPTER or ADAPTER=STRENGTH", param, ctx)
        try:
            number = float(strength)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(
                f"{value!r} is no file, and {strength!r} is no finite number; give ADAPTER=STRENGTH, as in {path}=0.8",
                param,
                ctx,
            )
        return AdapterArgument(Path(path), number)


class PathType(click.ParamType):
    """A path as given, a slash at its end included; whether it exists is found out when it is opened."""

    name = "path"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path unchanged; fail as wrong usage where it is empty."""
        if not value:
            self.fail("the path is empty; give the name of a file or folder", param, ctx)
        return value


class DeviceType(click.ParamType):
    """`auto`, `cuda:N` or `simulator`, by form only: whether that GPU exists is found out when it is opened."""

    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The device's name unchanged; fail as wrong usage where it is of no known form."""
        if not DEVICE_PATTERN.fullmatch(value):
            self.fail(f"{value!r} is not one of 'auto', 'cuda:N', 'simulator'", param, ctx)
        return value

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """How the help names it."""
        return "[auto|cuda:N|simulator]"
