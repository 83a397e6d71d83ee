"""Processes of a peer, one a problem: all compile at the same time, then they measure one after another.

A peer that takes half a minute to compile a problem has all of them ready in little more than that, and none is
compiled in a process that holds what another left there (torch.compile gives up after eight forms of a function).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

READY = "ready"


class Turns:
    """A context manager: starts ``script`` once for every problem, by name; ``take`` has one of them measure.

    A script calls `measure_in_turn`. What is still running is ended after ``seconds_allowed`` and at the end.
    """

    def __init__(self, script: Path, problems: dict[str, dict[str, Any]], seconds_allowed: float) -> None:
        self._script, self._processes, self._errors, self._open = script, {}, {}, ExitStack()
        workers = max(1, (os.cpu_count() or 1) // max(1, len(problems)))
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(workers)}
        self._watch = threading.Timer(seconds_allowed, self._end)
        for name, problem in problems.items():
            self._errors[name] = self._open.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
            process = subprocess.Popen(
                [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._errors[name], text=True, env=environment,
            )  # fmt: skip
            self._processes[name] = self._open.enter_context(process)
            self._tell(name, json.dumps(problem))
        self._all_ready = False

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.cancel()
        self._end()
        self._open.close()

    def _end(self) -> None:
        for process in self._processes.values():
            process.kill()

    def _tell(self, name: str, line: str) -> None:
        """Write a line to a process; one that has ended is found out when it is read from."""
        with suppress(BrokenPipeError):
            os.write(self._processes[name].stdin.fileno(), f"{line}\n".encode())

    def _wait_for_all(self) -> None:
        """Until no process compiles any more, so that none disturbs what is measured."""
        for process in self._processes.values():
            while (line := process.stdout.readline()) and line.strip() != READY:
                pass
        self._all_ready = True

    def take(self, name: str) -> Any:
        """What the process of this problem answers, which ends with it."""
        if not self._all_ready:
            self._wait_for_all()
        self._tell(name, "go")
        lines, process = self._processes[name].stdout.read().splitlines(), self._processes[name]
        status = process.wait()
        self._errors[name].seek(0)
        assert status == 0 and lines, f"{self._script.name}, {name}, ended with {status}:\n{self._errors[name].read()}"
        return json.loads(lines[-1])


def measure_in_turn(prepare: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """The script's side: ``prepare`` gets the problem, compiles, and returns what measures."""
    measure = prepare(json.loads(sys.stdin.readline()))
    print(READY, flush=True)
    if sys.stdin.readline():
        print(json.dumps(measure()), flush=True)
