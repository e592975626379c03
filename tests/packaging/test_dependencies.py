# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the package imports is what it says it depends on."""

from __future__ import annotations

import ast
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
    "project"
]

# Imported only where their users have them: in extras, or nowhere.
OPTIONAL = {
    "cellmw.deploy": {"eventlet"},
    "cellmw.metrics.definitions": {"prometheus-client"},
    "cellmw.metrics.page": {"prometheus-client"},
    "cellmw.metrics.recorder": {"prometheus-client"},
    "cellmw.testing.pytest_plugin": {"pytest"},
}

# _typeshed is there for type checkers only.
NOT_FOREIGN = sys.stdlib_module_names | {"cellmw", "_typeshed"}


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def imports() -> Iterator[tuple[str, str]]:
    """Pairs of one of our modules and a distribution that it imports."""
    providers = metadata.packages_distributions()
    for path in sorted((ROOT / "cellmw").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                if top in NOT_FOREIGN:
                    continue
                for provider in providers.get(top, [top]):
                    yield module, name_of(provider)


def test_every_import_is_a_declared_dependency() -> None:
    declared = {name_of(text) for text in PROJECT["dependencies"]}
    # Paste is imported as a namespace that PasteDeploy shares.
    declared.add("paste")
    missing = {
        (module, name)
        for module, name in imports()
        if name not in declared | OPTIONAL.get(module, set())
    }
    assert not missing


def test_every_dependency_has_a_lower_bound_and_no_upper_one() -> None:
    extras = PROJECT["optional-dependencies"].values()
    for requirement in itertools.chain(PROJECT["dependencies"], *extras):
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+", requirement)


def test_the_oldest_versions_are_those_that_are_tried() -> None:
    lines = (ROOT / "tests" / "lowest.txt").read_text("utf-8").splitlines()
    tried = dict(line.split("==") for line in lines if line[0] != "#")
    extras = PROJECT["optional-dependencies"]
    requirements = itertools.chain(
        PROJECT["dependencies"], *(extras[e] for e in tried_extras())
    )
    for requirement in requirements:
        name, bound = requirement.split(">=")
        assert f"{tried[name]}.".startswith(f"{bound}."), name


def tried_extras() -> list[str]:
    """Those of users; the rest is for the tests."""
    return ["mysql", "postgresql", "metrics"]


def test_the_readme_has_the_two_command_lines() -> None:
    readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    venv = "python3 -m venv .venv && .venv/bin/pip install"
    assert f"{venv} . && .venv/bin/cellmw-demo --check" in readme
    assert f"{venv} tox && .venv/bin/tox" in readme
