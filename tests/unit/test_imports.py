# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Imports run downward only, along this list."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "cellmw"

# From the bottom to the top.  A module imports from the layers below its own
# only.  One that ends in ".*" stands for all modules of that package, which
# may import each other.  A new module is added where it belongs.
LAYERS: tuple[frozenset[str], ...] = (
    # Values and helpers that know nothing of cells.
    frozenset({"cellmw.redaction.*", "cellmw.forks", "cellmw.garbage"}),
    frozenset({"cellmw.durations"}),
    frozenset({"cellmw.exceptions", "cellmw.workers"}),
    frozenset({"cellmw.pipeline", "cellmw.refusals"}),
    frozenset({"cellmw.faults", "cellmw.instance_path", "cellmw.janitor"}),
    frozenset({"cellmw.hidden_errors"}),
    frozenset({"cellmw.options.*", "cellmw.lenient_path"}),
    frozenset({"cellmw.configuration"}),
    # What is known of cells and instances.
    frozenset({"cellmw.cells", "cellmw.cells.urls", "cellmw.cells.tables"}),
    frozenset({"cellmw.cells.mapping"}),
    frozenset({"cellmw.cells.outage", "cellmw.cells.drivers"}),
    frozenset({"cellmw.cells.queries", "cellmw.cells.snapshot"}),
    frozenset({"cellmw.cells.instances", "cellmw.cells.engines"}),
    frozenset({"cellmw.cells.lookups"}),
    frozenset({"cellmw.cells.known"}),
    frozenset({"cellmw.cells.store", "cellmw.cells.directory"}),
    frozenset({"cellmw.cells.transactions"}),
    frozenset({"cellmw.cells.instance_changes"}),
    frozenset({"cellmw.cells.changes", "cellmw.cells.databases"}),
    frozenset({"cellmw.cells.migrations.*"}),
    # What is open.
    frozenset(
        {
            *("cellmw.transports", "cellmw.transports.closer"),
            "cellmw.transports.url_options",
        }
    ),
    frozenset({"cellmw.transports.driver.*", "cellmw.transports.guard"}),
    frozenset({"cellmw.transports.oslo", "cellmw.transports.pool"}),
    frozenset({"cellmw.transports.sending"}),
    frozenset({"cellmw.transports.handle"}),
    # What serves an API in other ways than by its contexts.
    frozenset({"cellmw.observe"}),
    frozenset({"cellmw.nova"}),
    # What the requests of a process share.
    frozenset({"cellmw.rpc"}),
    frozenset({"cellmw.process"}),
    frozenset({"cellmw.runtime"}),
    # One request, and what wires it all.
    frozenset({"cellmw.context"}),
    frozenset({"cellmw.scatter"}),
    frozenset({"cellmw.response_body"}),
    frozenset({"cellmw.middleware"}),
    frozenset({"cellmw.deploy"}),
    frozenset({"cellmw"}),
    frozenset({"cellmw.healthcheck", "cellmw.metrics.*"}),
    # For users: the top.
    frozenset({"cellmw.testing.*"}),
    frozenset({"cellmw.cli.*"}),
    frozenset({"cellmw.demo.*"}),
)

# oslo.messaging's ways to make a transport.
MAKERS = frozenset(
    {
        "get_notification_transport",
        "get_rpc_transport",
        "get_transport",
        "_get_transport",
    }
)
MAY_MAKE = ("cellmw.transports.oslo", "cellmw.testing", "cellmw.demo")


@functools.cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = ast.parse(path.read_text("utf-8"))
    return found


def layer_of(module: str) -> int | None:
    for number, layer in enumerate(LAYERS):
        for entry in layer:
            package = entry.removesuffix(".*")
            if module == package or (
                entry.endswith(".*") and module.startswith(f"{package}.")
            ):
                return number
    return None


def same_group(one: str, other: str) -> bool:
    """Whether both belong to one entry that stands for a whole package."""
    return any(
        all(f"{module}.".startswith(entry[:-1]) for module in (one, other))
        for layer in LAYERS
        for entry in layer
        if entry.endswith(".*")
    )


def imported(module: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The modules of ours that a module imports, and on which line.

    Those in functions count; those for the type checker alone do not.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            for alias in node.names:
                if f"{alias.name}.".startswith(f"{PACKAGE}."):
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: relative import"
            name = node.module or ""
            if f"{name}.".startswith(f"{PACKAGE}."):
                for alias in node.names:
                    inner = f"{name}.{alias.name}"
                    yield inner if is_module(inner) else name, node.lineno


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def problems(module: str, tree: ast.Module) -> Iterator[str]:
    own = layer_of(module)
    if own is None:
        yield f"{module} stands in no layer"
        return
    for target, line in imported(module, tree):
        other = layer_of(target)
        if target == module or same_group(module, target):
            continue
        if other is None:
            yield f"{module}:{line} imports {target}, which has no layer"
        elif other >= own:
            yield f"{module}:{line} imports {target}, which is not below it"


def test_imports_run_downward_only() -> None:
    found = [
        problem
        for module, tree in modules().items()
        for problem in problems(module, tree)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module,source",
    [
        ("cellmw.exceptions", "import cellmw.deploy"),
        ("cellmw.exceptions", "from cellmw import workers"),
        ("cellmw.rpc", "def f():\n    from cellmw import deploy"),
        ("cellmw.cells.store", "from cellmw.cells.directory import Stats"),
        ("cellmw.cells.store", "from cellmw import cli"),
        ("cellmw.cli.main", "from cellmw.demo import main"),
        ("cellmw.unheard_of", ""),
    ],
)
def test_an_import_upward_is_found(module: str, source: str) -> None:
    assert list(problems(module, ast.parse(source)))


@pytest.mark.parametrize(
    "module,source",
    [
        ("cellmw.deploy", "from cellmw import exceptions, runtime"),
        ("cellmw.cli.main", "import cellmw.cli.formats\nimport os"),
        ("cellmw.cli.main", "from cellmw import RequestContext"),
        ("cellmw.rpc", "if TYPE_CHECKING:\n    from cellmw import deploy"),
    ],
)
def test_an_import_downward_is_none(module: str, source: str) -> None:
    assert not list(problems(module, ast.parse(source)))


def test_one_module_alone_makes_transports() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        if not module.startswith(MAY_MAKE)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in MAKERS)
        or (isinstance(node, ast.Name) and node.id in MAKERS)
    ]
    assert not found, found
