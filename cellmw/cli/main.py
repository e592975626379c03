# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The program ``cellmw-manage``.

Owns the global options, the list of commands and the exit status.  The
commands stand in modules by their subject, and share :mod:`cellmw.cli.base`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from cliff import _argparse
from cliff import help as cliff_help
from cliff.app import App
from cliff.commandmanager import CommandManager

from cellmw import redaction
from cellmw.cli import arguments

PROGRAM = "cellmw-manage"

# oslo.messaging imports eventlet, which prepares a resolver of its own.  That
# takes a third of a command's start, and no command uses it.
os.environ.setdefault("EVENTLET_NO_GREENDNS", "yes")


class _Command(NamedTuple):
    """A command, which is loaded when it is run.

    :ivar value: its module and class, as an entry point names them
    :ivar summary: the first line of its description
    """

    value: str
    summary: str


COMMANDS: dict[str, _Command] = {
    "db sync": _Command(
        "cellmw.cli.schema:DbSync",
        "Create or upgrade the tables of the API database.",
    ),
    "cell list": _Command("cellmw.cli.cells:CellList", "List the cells."),
    "cell show": _Command(
        "cellmw.cli.cells:CellShow",
        "Show a cell, and its transport URL as it is filled in.",
    ),
    "cell create": _Command("cellmw.cli.cells:CellCreate", "Add a cell."),
    "cell update": _Command(
        "cellmw.cli.cells:CellUpdate",
        "Change a cell, and describe what running processes do.",
    ),
    "cell delete": _Command("cellmw.cli.cells:CellDelete", "Remove a cell."),
    "cell check": _Command(
        "cellmw.cli.check:CellCheck",
        "Try to reach the message broker of each cell.",
    ),
    "instance list": _Command(
        "cellmw.cli.instances:InstanceList",
        "List instance mappings, a page at a time.",
    ),
    "instance show": _Command(
        "cellmw.cli.instances:InstanceShow",
        "Show which cell an instance is in.",
    ),
    "instance map": _Command(
        "cellmw.cli.instances:InstanceMap",
        "Map an instance, or a file of instances, to a cell.",
    ),
    "instance unmap": _Command(
        "cellmw.cli.instances:InstanceUnmap",
        "Remove the mapping of an instance.",
    ),
    "doctor": _Command(
        "cellmw.cli.doctor.command:Doctor",
        "Check a service's configuration, paste file and cells.",
    ),
    "route": _Command(
        "cellmw.cli.route:Route",
        "Explain what a request for a URL would get, and why.",
    ),
}


class Help(cliff_help.HelpCommand):
    """Show the help of a command."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        arguments.report_errors_on_one_line(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        """Show the help, and return the exit status."""
        if not parsed_args.cmd:
            assert isinstance(self.app, ManageApp)
            self.app.show_help()
            return 0
        try:
            return super().take_action(parsed_args)
        except ValueError:
            # cliff only logs the error.
            return _no_such_command(self.app.stderr, parsed_args.cmd)


class ManageApp(App):
    """The program: its options, its commands and its logging."""

    NAME = PROGRAM
    LOG = logging.getLogger(PROGRAM)

    def __init__(self) -> None:
        self._at_the_end = contextlib.ExitStack()
        manager = CommandManager(None)
        for name, command in COMMANDS.items():
            manager.commands[name] = importlib.metadata.EntryPoint(
                name, command.value, PROGRAM
            )
        super().__init__(
            deferred_help=True,
            description=(
                "Show and change the cell mappings and instance mappings in "
                "the API database."
            ),
            version=importlib.metadata.version("cellmw"),
            command_manager=manager,
        )
        manager.add_command("help", Help)
        manager.commands.pop("complete", None)

    def build_option_parser(
        self,
        description: str | None,
        version: str | None,
        argparse_kwargs: object = None,
    ) -> argparse.ArgumentParser:
        """Build the parser of the options in front of the command."""
        parser = _argparse.ArgumentParser(
            prog=PROGRAM,
            usage=f"{PROGRAM} [options] COMMAND [options of the command]",
            description=description,
            add_help=False,
            # This parser also sees the commands' options, and must not take
            # an abbreviation of one for its own.
            allow_abbrev=False,
        )
        parser.add_argument(
            "-h",
            "--help",
            dest="deferred_help",
            action="store_true",
            help="Show this help, or the help of a command, and exit.",
        )
        parser.add_argument(
            "--version",
            action="version",
            version=f"{PROGRAM} {version}",
            help="Show the version and exit.",
        )
        verbosity = parser.add_mutually_exclusive_group()
        verbosity.add_argument(
            "-v",
            "--verbose",
            dest="verbose_level",
            action="store_const",
            const=2,
            default=1,
            help="Print the libraries' logs on standard error.",
        )
        verbosity.add_argument(
            "-q",
            "--quiet",
            dest="verbose_level",
            action="store_const",
            const=0,
            help="Hide progress.",
        )
        arguments.add_config_options(parser, dest="global_sources")
        # cliff can show tracebacks with local variables, which hold secrets.
        parser.set_defaults(debug=False)
        arguments.report_errors_on_one_line(parser)
        return parser

    def print_help_if_requested(self) -> None:
        """Show the help without loading any command, and exit."""
        if self.options.deferred_help:
            self.show_help()
            sys.exit(0)

    def show_help(self) -> None:
        """Show the options and the commands."""
        self.stdout.write(f"{self.parser.format_help()}\nCommands:\n")
        widest = max(map(len, COMMANDS))
        for name, command in COMMANDS.items():
            self.stdout.write(f"  {name:<{widest}}  {command.summary}\n")
        self.stdout.write(
            f"\nRun '{PROGRAM} COMMAND --help' for its options.\n"
        )

    def configure_logging(self) -> None:
        """Print scrubbed logs on standard error with ``--verbose``."""
        redaction.install()
        root = logging.getLogger()
        # Without any handler, logging prints warnings itself.
        handler: logging.Handler = logging.NullHandler()
        if self.options.verbose_level > 1:
            handler = logging.StreamHandler(self.stderr)
            handler.setFormatter(
                logging.Formatter("%(levelname)s %(name)s: %(message)s")
            )
            level = root.level
            root.setLevel(logging.DEBUG)
            self._at_the_end.callback(root.setLevel, level)
        root.addHandler(handler)
        self._at_the_end.callback(root.removeHandler, handler)

    def close(self) -> None:
        """Restore the logging configuration."""
        self._at_the_end.close()

    def interact(self) -> None:
        """There is no interactive mode."""
        arguments.complain(
            self.stderr, f"no command given (see {PROGRAM} --help)"
        )

    def run_subcommand(self, argv: list[str]) -> int:
        """Run a command, and return its exit status."""
        try:
            self.command_manager.find_command(argv)
        except ValueError:
            return _no_such_command(self.stderr, argv)
        return super().run_subcommand(argv)


def _no_such_command(stream: TextIO, argv: Sequence[str]) -> int:
    """Report an unknown command, and return the exit status."""
    words = [word for word in argv if not word.startswith("-")]
    arguments.complain(
        stream,
        f"no such command: {' '.join(words[:2]) or argv[0]} "
        f"(see {PROGRAM} --help)",
    )
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cellmw-manage``, and return its exit status.

    :param argv: the arguments; None: those of the process
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.closing(ManageApp()) as app:
            return app.run(arguments)
    except SystemExit as exit_:
        # argparse has already printed the error or the help.
        return exit_.code if isinstance(exit_.code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
