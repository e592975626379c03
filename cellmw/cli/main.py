# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The program ``cellmw-manage``.

Owns the global options, the list of commands and the exit status.  A command
is in a module of its own kind; what all of them need is in
:mod:`cellmw.cli.base`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from typing import TextIO

from cliff import _argparse
from cliff import help as cliff_help
from cliff.app import App
from cliff.commandmanager import CommandManager

from cellmw import redaction
from cellmw.cli import base, cells, check, instances, route, schema

PROGRAM = "cellmw-manage"
COMMANDS: dict[str, type[base.Command]] = {
    "db sync": schema.DbSync,
    "cell list": cells.CellList,
    "cell show": cells.CellShow,
    "cell create": cells.CellCreate,
    "cell update": cells.CellUpdate,
    "cell delete": cells.CellDelete,
    "cell check": check.CellCheck,
    "instance show": instances.InstanceShow,
    "instance map": instances.InstanceMap,
    "instance unmap": instances.InstanceUnmap,
    "route": route.Route,
}


class Help(cliff_help.HelpCommand):
    """Show the help of a command."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        base.report_errors_on_one_line(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        """Show it and give the exit status."""
        try:
            return super().take_action(parsed_args)
        except ValueError:
            # cliff logs it, where nobody looks.
            return _no_such_command(self.app.stderr, parsed_args.cmd)


class ManageApp(App):
    """The commands, and what they have in common."""

    NAME = PROGRAM
    LOG = logging.getLogger(PROGRAM)

    def __init__(self) -> None:
        self._at_the_end = contextlib.ExitStack()
        manager = CommandManager(None)
        for name, command in COMMANDS.items():
            manager.add_command(name, command)
        super().__init__(
            deferred_help=True,
            description=(
                "Look at and change which cells there are, and which "
                "instance is in which cell, in the API database."
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
        """The options that stand before the command."""
        parser = _argparse.ArgumentParser(
            prog=PROGRAM,
            usage=f"{PROGRAM} [options] COMMAND [options of the command]",
            description=description,
            add_help=False,
            # It sees the options of the commands as well, and takes none
            # of them for one of its own.
            allow_abbrev=False,
        )
        parser.add_argument(
            "-h",
            "--help",
            dest="deferred_help",
            action="store_true",
            help="Show this text, or that of the command, and exit.",
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
            help="Show the logs of the libraries on standard error.",
        )
        verbosity.add_argument(
            "-q",
            "--quiet",
            dest="verbose_level",
            action="store_const",
            const=0,
            help="Show no progress.",
        )
        base.add_config_options(parser, dest="global_sources")
        # cliff shows tracebacks on demand; with locals they hold secrets.
        parser.set_defaults(debug=False)
        base.report_errors_on_one_line(parser)
        return parser

    def configure_logging(self) -> None:
        """Logs go to standard error, scrubbed, if they are asked for."""
        redaction.install()
        root = logging.getLogger()
        # With no handler at all, warnings of libraries would be printed.
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
        """Leave logging as it was before."""
        self._at_the_end.close()

    def interact(self) -> None:
        """There is no interactive mode."""
        base.complain(self.stderr, f"no command given (see {PROGRAM} --help)")

    def run_subcommand(self, argv: list[str]) -> int:
        """Run a command and give its exit status."""
        try:
            self.command_manager.find_command(argv)
        except ValueError:
            return _no_such_command(self.stderr, argv)
        return super().run_subcommand(argv)


def _no_such_command(stream: TextIO, argv: Sequence[str]) -> int:
    """Say so, and give the exit status."""
    words = [word for word in argv if not word.startswith("-")]
    base.complain(
        stream,
        f"no such command: {' '.join(words[:2]) or argv[0]} "
        f"(see {PROGRAM} --help)",
    )
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cellmw-manage`` and give its exit status.

    :param argv: the arguments; None: those of the process
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.closing(ManageApp()) as app:
            return app.run(arguments)
    except SystemExit as exit_:
        # argparse has said what is wrong, or shown what was asked for.
        return exit_.code if isinstance(exit_.code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
