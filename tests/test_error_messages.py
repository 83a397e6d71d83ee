"""Every refusal says what to do: found by reading the sources, so that a new message cannot forget it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from plans.core import BufferTooSmall, NoSku, WorkspaceTooSmall

ROOT = Path(__file__).parents[1]
PACKAGES = ("lycoris", "plans")

REFUSALS = frozenset(
    {"RefusedInput", "MergeFailed", "CommandError", "InvalidProblem", "Unsupported", "MisalignedOperand"}
)
"""Classes whose message is written where they are raised; those of `MADE` make it themselves."""

MADE = (BufferTooSmall("cast: out", 8, 4), WorkspaceTooSmall("cast", 8, 4), NoSku("cast", "i32", {"mma": "takes bf16"}))

PASSED_ON = frozenset({"str(error)", "str(self._failure)"})
"""Messages of other refusals, which say it already."""


def refusals(package: str) -> Iterator[tuple[str, str]]:
    """(place, message as written) of every one in a package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSALS:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.args[0])


@pytest.mark.parametrize("package", PACKAGES)
def test_every_refusal_ends_with_advice(package):
    """`found, wanted; what to do`: the clause stands behind a semicolon, or in a constant that ends the message."""
    found = list(refusals(package))
    assert found, f"no refusal in {package}: the search is at fault"
    silent = [
        f"{place}: {message}"
        for place, message in found
        if message not in PASSED_ON and ";" not in message and "_DAMAGED" not in message
    ]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_classes_that_make_their_message_give_advice(error):
    assert ";" in str(error) and "\n" not in str(error)
