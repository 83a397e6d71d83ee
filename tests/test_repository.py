"""The house rules that a machine can check."""

import ast
import re
import sys
import tomllib
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import lycoris

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "plans", "lycoris")
SOURCES = sorted(path for folder in (*PACKAGES, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted(path for folder in (".", "docs", "examples", "benchmarks") for path in (ROOT / folder).glob("*.md"))
MAX_LINES = 400


def setup_cfg() -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def imported_modules(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


def test_imports_run_one_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    failed = lint_imports(config_filename="setup.cfg", no_cache=True)
    assert not failed, capsys.readouterr().out


def test_files_stay_readable():
    assert SOURCES
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: count for path, count in lengths.items() if count > MAX_LINES} == {}


def test_version_is_said_once_and_everywhere_the_same():
    assert metadata.version("lycoris-numba") == lycoris.__version__
    released = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None
    assert released[1] == lycoris.__version__


def test_third_party_imports_are_declared():
    declared = {
        re.match(r"[\w-]+", line)[0].lower().replace("_", "-")
        for line in setup_cfg()["options"]["install_requires"].splitlines()
        if line and not line.startswith("#")
    }
    distributions = metadata.packages_distributions()
    for path in (path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES):
        for module in imported_modules(path):
            top = module.partition(".")[0]
            if top in PACKAGES or top in sys.stdlib_module_names:
                continue
            found = {name.lower().replace("_", "-") for name in distributions.get(top, [])}
            assert found & declared, f"{path.relative_to(ROOT)} imports {module}, setup.cfg names none of {found}"


def test_every_folder_with_code_is_a_package_that_gets_installed():
    folders = {path.parent for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES}
    assert {folder.relative_to(ROOT) for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_pyproject_holds_build_system_and_formatter_only():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert tables.keys() == {"build-system", "tool"}
    assert tables["tool"].keys() == {"ruff"}


def test_links_between_pages_lead_somewhere():
    assert PAGES
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith(("https://", "http://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
