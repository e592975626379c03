# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What an operator gets from ``pip install`` works by itself.

The wheel is built and installed into a virtual environment of its own, with
what it depends on and nothing else.  That needs a package index.
"""

from __future__ import annotations

import os
import subprocess
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

# Building and installing takes a minute or two where nothing is cached.
pytestmark = pytest.mark.timeout(900)


def run(*command: str | Path, cwd: Path, timeout: float = 60) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "COVERAGE"))
        and name != "VIRTUAL_ENV"
    }
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somewhere that is not the checkout."""
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Path:
    """The commands' folder of a virtual environment that is empty yet."""
    venv.create(folder / "venv", with_pip=True)
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def wheel(folder: Path, fresh: Path) -> Path:
    """The wheel, built from a copy of what belongs to the package."""
    if not index_answers(folder, fresh):
        servers.missing(
            "no package index can be reached",
            "let pip reach one (PIP_INDEX_URL)",
        )
    source = folder / "source"
    copy_checkout(source)
    run(
        *(fresh / "python", "-m", "pip", "wheel", "-q", "--no-deps"),
        *("-w", folder, source),
        cwd=folder,
        timeout=300,
    )
    (wheel,) = folder.glob("cellmw-*.whl")
    return wheel


def index_answers(folder: Path, fresh: Path) -> bool:
    try:
        run(
            *(fresh / "python", "-m", "pip", "download", "-q", "--no-deps"),
            *("--retries", "1", "-d", folder / "probe", "setuptools"),
            cwd=folder,
            timeout=60,
        )
    except (AssertionError, subprocess.TimeoutExpired):
        return False
    return True


def copy_checkout(target: Path) -> None:
    """Copy what the build reads; building in place would leave things."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "cellmw", "etc"):
        if (ROOT / name).exists():
            subprocess.run(
                ["cp", "-a", str(ROOT / name), str(target)], check=True
            )


@pytest.fixture(scope="module")
def installed(folder: Path, fresh: Path, wheel: Path) -> Path:
    """The commands' folder of an environment with the wheel in it."""
    run(
        *(fresh / "python", "-m", "pip", "install", "-q", wheel),
        cwd=folder,
        timeout=600,
    )
    return fresh


@pytest.fixture(scope="module")
def contents(wheel: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel) as archive:
        yield archive


def test_everything_is_in_the_wheel(contents: zipfile.ZipFile) -> None:
    names = set(contents.namelist())
    version = PROJECT["project"]["version"]
    licence = f"cellmw-{version}.dist-info/licenses/LICENSE"
    assert licence in names
    assert contents.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "cellmw/py.typed" in names
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "cellmw").rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".pyo"}
    }
    assert {name for name in names if name.startswith("cellmw/")} == expected
    assert not {name for name in names if name.startswith("tests/")}


def test_the_sample_is_one_file(contents: zipfile.ZipFile) -> None:
    sample = (ROOT / "etc" / "api-paste.ini.sample").read_bytes()
    copies = [
        name
        for name in contents.namelist()
        if name.endswith("api-paste.ini.sample")
    ]
    assert len(copies) == 1
    assert contents.read(copies[0]) == sample


def test_the_metadata_is_what_the_project_says(
    installed: Path, folder: Path
) -> None:
    program = (
        "import importlib.metadata as m; d = m.metadata('cellmw'); "
        "print(d['Version'], d['License-Expression'], d['Requires-Python'])"
    )
    assert run(*(installed / "python", "-c", program), cwd=folder).split() == [
        PROJECT["project"]["version"],
        "Apache-2.0",
        ">=3.11",
    ]


def test_every_entry_point_loads(installed: Path, folder: Path) -> None:
    program = (
        "import importlib.metadata as m\n"
        "for e in m.distribution('cellmw').entry_points:\n"
        "    assert callable(e.load()), e\n"
        "    print(e.group, e.name)\n"
    )
    loaded = {
        tuple(line.split())
        for line in run(
            *(installed / "python", "-c", program), cwd=folder
        ).splitlines()
    }
    declared = {
        (group, name)
        for group, entries in PROJECT["project"]["entry-points"].items()
        for name in entries
    }
    declared |= {
        ("console_scripts", name) for name in PROJECT["project"]["scripts"]
    }
    assert loaded == declared


def test_paste_loads_the_section_of_the_readme(
    installed: Path, folder: Path
) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    section = readme.partition("[filter:cellmw]")[2].partition("```")[0]
    assert "use = egg:cellmw" in section
    paste = folder / "api-paste.ini"
    paste.write_text(
        f"[filter:cellmw]{section}api_database_connection = sqlite://\n"
    )
    program = (
        "from paste import deploy\n"
        f"f = deploy.loadfilter('config:{paste}', name='cellmw')\n"
        "print(callable(f(lambda environ, start_response: [])))\n"
    )
    printed = run(*(installed / "python", "-c", program), cwd=folder)
    assert printed.split() == ["True"]


def test_the_option_generator_writes_every_option(
    installed: Path, folder: Path
) -> None:
    written = run(
        *(installed / "oslo-config-generator", "--namespace", "cellmw"),
        cwd=folder,
    )
    assert "[cellmw]" in written
    program = (
        "from cellmw import options\n"
        "for group, opts in options.list_opts():\n"
        "    for opt in opts:\n"
        "        print(opt.name)\n"
    )
    names = run(*(installed / "python", "-c", program), cwd=folder).split()
    assert len(names) >= 20
    for name in names:
        assert f"\n#{name} =" in written, name


def test_commands_of_the_plain_installation_start(
    installed: Path, folder: Path
) -> None:
    for command in PROJECT["project"]["scripts"]:
        assert "usage" in run(installed / command, "--help", cwd=folder)


def test_the_demo_checks_itself(installed: Path, folder: Path) -> None:
    run(installed / "cellmw-demo", "--check", cwd=folder, timeout=180)
