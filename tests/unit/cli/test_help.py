# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the commands say about themselves, and about wrong arguments."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys

import pytest

from cellmw.cli import base
from cellmw.cli import main as cli

NAMES = sorted(cli.COMMANDS)
INSTANCE = "5f4b3a52-39d5-4c11-8f2b-000000000001"


def command_of(name: str) -> type[base.Command]:
    module, _, attribute = cli.COMMANDS[name].value.partition(":")
    command: type[base.Command] = getattr(
        importlib.import_module(module), attribute
    )
    return command


def parser_of(name: str) -> argparse.ArgumentParser:
    app = cli.ManageApp()
    return command_of(name)(app, None).get_parser(f"cellmw-manage {name}")


def test_the_help_lists_each_command_with_what_it_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in NAMES:
        summary = (command_of(name).__doc__ or "").splitlines()[0]
        line = rf"^  {name} +{re.escape(summary)}$"
        assert re.search(line, text, re.MULTILINE), name
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out == text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_help_loads_no_library_that_only_commands_need() -> None:
    code = (
        "import sys; from cellmw.cli.main import main; main(['--help']); "
        "heavy = {'oslo_messaging', 'sqlalchemy', 'alembic', 'oslo_config'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_a_help_that_names_its_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    first = capsys.readouterr()
    assert cli.main(["help", *name.split()]) == 0
    assert capsys.readouterr().out == first.out
    assert first.err == ""
    assert first.out.startswith(f"usage: cellmw-manage {name} ")
    assert "--config-file FILE" in first.out
    assert all(len(line) <= 80 for line in first.out.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_each_option_is_described(name: str) -> None:
    for action in parser_of(name)._actions:
        assert action.help, action.option_strings or action.dest


@pytest.mark.parametrize("name", NAMES)
def test_each_command_is_described_in_a_line_of_its_own(name: str) -> None:
    first, *rest = (command_of(name).__doc__ or "").splitlines()
    assert 10 < len(first) < 70
    assert first.endswith(".")
    assert not rest or not rest[0]


def test_lists_have_five_formats() -> None:
    for name in ("cell list", "cell check", "instance list", "route"):
        (action,) = (
            action
            for action in parser_of(name)._actions
            if action.dest == "formatter"
        )
        assert set(action.choices or ()) >= {
            *("table", "json", "yaml", "csv", "value"),
        }


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cellmw-manage ")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "no command given"),
        (["cell"], "no such command: cell"),
        (["cells", "list"], "no such command: cells list"),
        (["cell", "list", "--color"], "unrecognized arguments: --color"),
        (["cell", "list", "--qui"], "unrecognized arguments: --qui"),
        (["cell", "list", "-f", "xml"], "invalid choice"),
        (["cell", "show"], "required: CELL"),
        (["cell", "show", "a\nb"], "CELL: it takes 1 to 255 printable"),
        (["cell", "show", ""], "CELL: it takes 1 to 255 printable"),
        (["instance", "show", "one"], "INSTANCE: it is not a UUID"),
        (["instance", "show", INSTANCE[:-1]], "INSTANCE: it is not a UUID"),
        (["instance", "show", f"{{{INSTANCE}}}"], "INSTANCE: it is not a UU"),
        (["cell", "create"], "required: --transport-url"),
        (["cell", "create", "--transport-url", ""], "--transport-url: it is"),
        (["cell", "create", "--uuid", "x"], "--uuid: it is not a UUID"),
        (["cell", "create", "--name", " "], "--name: it takes 1 to 255"),
        (["cell", "create", "--name", "x" * 256], "--name: it takes 1 to"),
        (["cell", "create", "--name", "a\nb"], "--name: it takes 1 to 255"),
        (["cell", "update", INSTANCE, "--enable", "--disable"], "not allowed"),
        (["cell", "check", "--timeout", "0"], "--timeout: it takes seconds"),
        (["cell", "check", "--timeout", "inf"], "--timeout: it takes"),
        (["cell", "check", "--timeout", "soon"], "--timeout: it takes"),
        (["instance", "map"], "INSTANCE --file is required"),
        (["instance", "map", INSTANCE, "--file", "f"], "not allowed with"),
        (["instance", "map", "--file", "f", "--batch-size", "0"], "a number"),
        (["instance", "map", INSTANCE, "--cell", " "], "--cell: it takes 1"),
        (["instance", "list", "--limit", "0"], "a number from 1 to 100000"),
        (["instance", "list", "--marker", "x"], "--marker: it is not a UUID"),
        (["instance", "unmap", "x"], "INSTANCE: it is not a UUID"),
        (["route"], "required: URL"),
        (["help", "nosuch"], "no such command: nosuch (see"),
        (["--help", "nosuch", "it"], "no such command: nosuch it (see"),
        (["nosuch", "--help"], "no such command: nosuch (see"),
        (["help", "--nosuch"], "unrecognized"),
        (["route", "/", "--method", "GET /"], "--method: it is not"),
        # What somebody pastes into the wrong place may hold a password.
        (["cell", "show", "rabbit://u:Zpw@h/"], "of a cell, not a URL"),
        (
            ["cell", "create", "--transport-url", "rabbit://u:a", "Zpw@h/"],
            "unrecognized arguments: ***",
        ),
        (["cell", "delete", INSTANCE, "rabbit://u:Zpw@h/"], "unrecognized"),
    ],
)
def test_wrong_arguments_are_one_line_on_standard_error(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("cellmw-manage: ")
    assert said in captured.err
    assert "Zpw" not in captured.err
