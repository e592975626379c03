# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The program ``cellmw-demo``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cellmw import exceptions, redaction
from cellmw.demo import brokers, check, keystone, site
from cellmw.demo.errors import DemoError
from cellmw.demo.hosts import Ledger, Received

PROGRAM = "cellmw-demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cellmw-demo``; gives its exit status.

    0: it ran, and with ``--check`` all was right; 1: something was wrong, or
    nobody read it; 2: it could not run; 130: ``--check`` was interrupted.

    :param argv: the arguments; None: those of the process
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if arguments.debug else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
    )
    redaction.install()
    holds = redaction.KNOWN.hold(
        *(
            redaction.Secret(u)
            for u in (arguments.rabbit, arguments.database)
            if u
        )
    )
    _end_on_signals()
    try:
        return _run(arguments)
    except (DemoError, exceptions.ConfigurationError) as error:
        text = redaction.one_line(redaction.scrub(f"{error}"))
        print(f"{PROGRAM}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130 if arguments.check else 0
    except BrokenPipeError:
        # Whoever read this has gone; the interpreter's last flush must not
        # complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        holds.drop()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description=(
            "An API service with three cells on this machine and a compute "
            "host in each, behind the pipeline of the sample paste file. It "
            "needs no other service and removes all that it has made."
        ),
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {importlib.metadata.version('cellmw')}",
        help="show the version and end",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="send requests over HTTP, print which host answered each, and "
        "end; the exit status is 0 only if every message reached its cell",
    )
    _add_servers(parser)
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="file with options, mainly of [cellmw]; can be repeated. The "
        "demo sets the URLs of queues and databases itself",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=0,
        help="port on 127.0.0.1 for the API (default: a free port)",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="write the logs to standard error",
    )
    return parser


def _add_servers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rabbit",
        metavar="URL",
        help="use this RabbitMQ (rabbit://user:password@host:5672/) instead "
        "of brokers in memory, with a virtual host for each cell",
    )
    parser.add_argument(
        "--rabbitmqctl",
        metavar="COMMAND",
        help="command that makes the virtual hosts, such as 'sudo "
        "rabbitmqctl'; the default is rabbitmqctl for a broker on this "
        "machine, and else the management API of the broker",
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        help="use this database (mysql+pymysql://user:password@host/name, or "
        "one of PostgreSQL) instead of SQLite; it must not have our tables",
    )


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 6:
        port = int(text)
        if port <= 65535:
            return port
    raise argparse.ArgumentTypeError("it takes a number from 0 to 65535")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        text = redaction.one_line(redaction.scrub(message))
        self.exit(2, f"{PROGRAM}: {text}\n")


def _end_on_signals() -> None:
    """Let Ctrl-C, and what ends a program in the background, end this one.

    Once: what is to be removed is removed then, and a second signal must
    not come in between.
    """
    ending = False

    def end(number: int, frame: object) -> None:
        nonlocal ending
        if not ending:
            ending = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def _run(arguments: argparse.Namespace) -> int:
    where: brokers.Brokers = brokers.Memory()
    if arguments.rabbit is not None:
        where = brokers.RabbitMQ(arguments.rabbit, arguments.rabbitmqctl)
    ledger = Ledger(None if arguments.check else _tell)
    options = _read(arguments.config_file)
    print(f"Starting three cells on {where.kind} ...", flush=True)
    with site.open_site(
        where,
        ledger,
        database_url=arguments.database,
        port=arguments.port,
        options=options,
    ) as up:
        print(
            "Each has a compute host; the API database is "
            f"{up.database}, and the pipeline that of\n{up.paste_file}\n"
        )
        if arguments.check:
            return 0 if check.Check(up).run() else 1
        print(_what_to_try(up), flush=True)
        threading.Event().wait()
    return 0


def _read(files: list[Path]) -> str:
    texts = []
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(
                f"{file} cannot be read ({type(error).__name__})"
            ) from None
    return "\n".join(texts)


def _tell(received: Received) -> None:
    # Whoever reads this may have gone.
    with contextlib.suppress(OSError, ValueError):
        print(
            f"  {received.host} in {received.cell}: {received.method} "
            f"{received.instance_uuid}",
            flush=True,
        )


def _what_to_try(up: site.Site) -> str:
    servers = f"{up.url}/v2.1/servers"
    first = up.instances[0].uuid
    curl = f"curl -H 'X-Auth-Token: {keystone.TOKEN}'"
    post = f"{curl} -H 'Content-Type: application/json'"
    listed = "\n".join(
        f"  {instance.uuid}  {instance.name:<12} {instance.cell}"
        for instance in up.instances
    )
    return f"""\
The instances, and the cells that the API database has them in:

{listed}

Try:

  {curl} {servers}
  {curl} {servers}/{first}
  {post} \\
    -d '{{"reboot": {{"type": "SOFT"}}}}' {servers}/{first}/action
  {post} \\
    -d '{{"os-getConsoleOutput": {{}}}}' {servers}/{first}/action
  {curl} -X DELETE {servers}/{first}

and, to see why a request goes where it goes:

  cellmw-manage --config-file {shlex.quote(str(up.config_file))} \\
    route /v2.1/servers/{first}

Ctrl-C ends the demo. What reaches a host:
"""


if __name__ == "__main__":
    sys.exit(main())
