"""The tables of docs/benchmarks.md from pytest-benchmark's JSON, so that no number is typed by hand.

    python benchmarks/report.py results.json [more.json ...]

Of a benchmark in several files the latest run counts. Exit status 1 where a gate was missed, or a benchmark failed or
did not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->\n", "<!-- end of results -->\n"
TITLES = {
    "one weight": "One weight",
    "whole checkpoint": "A whole checkpoint",
    "lycoris merge": "`lycoris merge`",
    "beside lycoris-lora": "Beside lycoris-lora",
    "launch cost": "Cost of a launch, CPU time",
    "products": "Products, beside cuBLAS",
    "convolutions": "Convolutions, beside cuDNN",
    "gradients of convolutions": "Gradients of convolutions, beside cuDNN",
    "layers": "Linear layers with live adapters, beside the bare one by cuBLAS",
    "layers beside peers": "Linear layers with live adapters, beside lycoris-lora and PEFT",
    "attention": "Attention, beside PyTorch's flash attention",
    "training layers": "Layers with a trained adapter, forward and backward",
    "training kernels": "Kernels of training",
    "training steps": "Whole steps of training",
    "hyper-connections": "Hyper-connections",
    "hyper-connections beside torch": "Hyper-connections beside torch",
    "hyper-connections beside Liger-Kernel": "Hyper-connections beside Liger-Kernel",
    "sinkhorn": "Sinkhorn alone",
}
"""pytest-benchmark's groups, in the page's order."""
COLUMNS = ("work", "shape", "algorithm", "kernel", "ours", "limit", "limit is", "ratio", "gate", "met")
LIBRARIES = ("numba", "numba-cuda", "cuda-core", "cuda-bindings", "numpy")


@dataclass(frozen=True)
class Entry:
    """One benchmark of one run: the run's date and machine, in words, and the benchmark's record."""

    when: str
    machine: str
    record: dict[str, Any]

    @property
    def results(self) -> list[dict[str, Any]]:
        """What `measure.record` kept; nothing where the benchmark failed before."""
        return self.record["extra_info"].get("results", [])


def read(paths: Iterable[Path]) -> tuple[list[Entry], dict[str, str]]:
    """The benchmarks of all files, each once, and what the files say about those that none of them measured.

    A benchmark is as its latest run found it, in the order of the first appearance.
    """
    found: dict[str, Entry] = {}
    unmeasured: dict[str, str] = {}
    for path in paths:
        run = json.loads(path.read_text())
        unmeasured |= run["unmeasured"]
        for record in run["benchmarks"]:
            entry = Entry(run["datetime"], machine_of(run, record), record)
            name = record["fullname"]
            if name not in found or found[name].when <= entry.when:
                found[name] = entry
    return list(found.values()), {name: why for name, why in unmeasured.items() if name not in found}


def machine_of(run: dict[str, Any], record: dict[str, Any]) -> str:
    """Date, device, driver and versions in a line."""
    info = run["machine_info"]
    ours = info["lycoris"]
    libraries = {name: ours["libraries"][name] for name in LIBRARIES} | record["extra_info"].get("peer", {})
    versions = ", ".join(
        f"{name} {version}" for name, version in {"Python": info["python_version"], **libraries}.items()
    )
    return f"{run['datetime'][:10]}, {ours['device']}, driver {ours.get('driver', 'none')}, {versions}"


def duration(seconds: float) -> str:
    """Three or four digits in a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"
    raise AssertionError(seconds)


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    gate, met = ("-", "-") if result["gate"] is None else (f"{result['gate']:g}", "yes" if result["met"] else "**no**")
    return (
        result["work"],
        result["shape"],
        result["algorithm"],
        result["kernel"],
        duration(result["seconds"]),
        duration(result["limit_seconds"]),
        result["limit"],
        f"{result['ratio']:.3f}",
        gate,
        met,
    )


def rows_of(entry: Entry) -> list[tuple[str, ...]]:
    """The rows of a benchmark; one that failed before it had a result shows its name."""
    if entry.results:
        return [cells(result) for result in entry.results]
    return [(entry.record["name"], *[""] * (len(COLUMNS) - 2), "**failed**")]


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Markdown lines."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def verdicts(entries: list[Entry], unmeasured: dict[str, str]) -> list[str]:
    """How many kept their gates, and the names of the others."""
    missed = [e.record["name"] for e in entries if not e.results or not all(row["met"] for row in e.results)]
    lines = [f"{len(entries) - len(missed)} of {len(entries)} benchmarks keep their gates."]
    lines += [f"Missed: {name}" for name in missed]
    return lines + [f"Not measured: {name.rpartition('::')[2]} ({why})" for name, why in unmeasured.items()]


def report(entries: list[Entry], unmeasured: dict[str, str]) -> str:
    """The verdicts and all tables, as Markdown."""
    first, *others = verdicts(entries, unmeasured)
    lines = [first, "", *(f"- {line}" for line in others), *[""] * bool(others)]
    assert not (unknown := {entry.record["group"] for entry in entries} - set(TITLES)), unknown
    for group, title in TITLES.items():
        members = [entry for entry in entries if entry.record["group"] == group]
        if members:
            machines = dict.fromkeys(entry.machine for entry in members)
            rows = [row for entry in members for row in rows_of(entry)]
            lines += [f"### {title}", "", *(f"- {line}" for line in machines), "", *table(rows), ""]
    return "\n".join(lines)


def rewritten(page: str, results: str) -> str:
    """The page with what lies between the markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: {PAGE} has no lines {BEGIN.strip()!r} and {END.strip()!r}; put them back")
    return f"{before}{BEGIN}\n{results}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("results", nargs="+", type=Path, help="files that pytest --benchmark-json=... wrote")
    parser.add_argument("--print", action="store_true", help=f"print the tables and leave {PAGE.name} alone")
    options = parser.parse_args()
    entries, unmeasured = read(options.results)
    text = report(entries, unmeasured)
    if options.print:
        print(text)
    else:
        PAGE.write_text(rewritten(PAGE.read_text(), text))
    first, *others = verdicts(entries, unmeasured)
    print(first, *others, sep="\n", file=sys.stderr)
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
