# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Command-line options and their types.

``cellmw-manage --help`` imports no other module of this package.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import TextIO

from cellmw import redaction
from cellmw.redaction import Secret

# How argparse begins its error.
_UNRECOGNIZED = "unrecognized arguments: "

is_uuid = re.compile(
    r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
).fullmatch


def complain(stream: TextIO, text: str) -> None:
    """Print an error as one line, without credentials."""
    stream.write(
        f"cellmw-manage: {redaction.one_line(redaction.scrub(text))}\n"
    )


def add_config_options(parser: argparse.ArgumentParser, *, dest: str) -> None:
    """Add the options for configuration files and directories.

    Both share one list, because a later file wins, as in oslo.config.
    """
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        action="append",
        type=_source("--config-file"),
        dest=dest,
        help=(
            "Configuration file of the service, for example nova.conf. Its "
            "[api_database], [DEFAULT] transport_url and [cellmw] are used. "
            "Can be repeated; a later file wins. Default: the files that "
            "oslo.config finds for cellmw, such as /etc/cellmw/cellmw.conf."
        ),
    )
    parser.add_argument(
        "--config-dir",
        metavar="DIR",
        action="append",
        type=_source("--config-dir"),
        dest=dest,
        help=(
            "Directory whose *.conf files are read in the order of their "
            "names. Can be repeated, and mixed with --config-file. Default: "
            "the directories that oslo.config finds for cellmw, such as "
            "/etc/cellmw/cellmw.conf.d."
        ),
    )


def _source(option: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if not text:
            raise argparse.ArgumentTypeError("it is empty")
        return f"{option}={text}"

    return convert


def report_errors_on_one_line(parser: argparse.ArgumentParser) -> None:
    """Make a parser report errors on one line, without the usage."""

    def error(message: str) -> None:
        if message.startswith(_UNRECOGNIZED):
            # They may be the rest of a URL with a space in it.
            words = message.removeprefix(_UNRECOGNIZED).split(" ")
            hidden = ["***" if "@" in word else word for word in words]
            message = _UNRECOGNIZED + " ".join(hidden)
        complain(sys.stderr, message)
        parser.exit(2)

    # cliff makes the parser, so there is no class to derive.
    parser.error = error  # type: ignore[method-assign,assignment]  # of this parser alone


def uuid(text: str) -> str:
    """Convert a UUID to lower case, as the tables hold it."""
    if not is_uuid(text):
        raise argparse.ArgumentTypeError("it is not a UUID")
    return text.lower()


def name(text: str) -> str:
    """Accept a text that fits a column of 255 characters."""
    if not text.strip() or len(text) > 255 or not text.isprintable():
        raise argparse.ArgumentTypeError(
            "it takes 1 to 255 printable characters"
        )
    return text


def cell(text: str) -> str:
    """Convert a cell's UUID to lower case, or accept its name."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            "it takes the UUID or the name of a cell, not a URL"
        )
    return uuid(text) if is_uuid(text) else name(text)


def secret(text: str) -> Secret:
    """Accept a URL with credentials; ``-`` reads it from standard input."""
    if text == "-":
        text = sys.stdin.readline().strip()
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Secret(text)


def seconds(text: str) -> float:
    """Convert a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("it takes seconds above 0")
    return value


def number(least: int, most: int) -> Callable[[str], int]:
    """Return a converter for whole numbers in a range."""

    def convert(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) < 20:
            value = int(text)
            if least <= value <= most:
                return value
        raise argparse.ArgumentTypeError(
            f"it takes a number from {least} to {most}"
        )

    return convert
