"""The README keeps its word: its commands and its Python run as printed, in order."""

import os
import re
import shutil
import subprocess
import sys
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
INSTALL = "python3 -m venv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples in it, as the README's reader has them."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def run(command: list[str], folder: Path) -> str:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_install_commands_are_the_two_that_ci_runs():
    """`.ci/run` takes the first two blocks of the README: one installs and merges, one installs and tests."""
    shell = [text for language, text in BLOCKS if language == "sh"]
    merge, test = shell[:2]
    assert merge.startswith(INSTALL)
    assert "lycoris merge examples/" in merge
    assert test.startswith(INSTALL)
    assert test.rstrip().endswith("pytest")
    assert not any(INSTALL in text for text in shell[2:])


def test_blocks_run_in_order(folder: Path):
    """Shell blocks and Python blocks; a text block after one is what it prints, `...` for what may differ."""
    ran, printed = set(), ""
    for language, text in BLOCKS:
        if language == "text":
            assert OutputChecker().check_output(text, printed, ELLIPSIS | NORMALIZE_WHITESPACE), printed
        elif language == "python":
            printed = run([sys.executable, "-c", text], folder)
        elif not text.startswith(INSTALL):
            printed = run(["bash", "-euo", "pipefail", "-c", text], folder)
        ran.add(language)
    assert ran == {"sh", "python", "text"}
