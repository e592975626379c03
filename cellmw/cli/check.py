# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The command ``cellmw-manage cell check``, which tries each broker.

Each broker is tried in a thread of its own, because a connection attempt may
never return, whatever its timeouts are.  Such a thread is left behind, and
ends with the program.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import oslo_messaging

from cellmw import exceptions, redaction
from cellmw.cells.mapping import Cell, CellMapping, Generation
from cellmw.cli import arguments, base, cells
from cellmw.transports import driver, oslo
from cellmw.workers import Job, Workers

# Brokers tried at once.
_AT_ONCE = 32

_UNREACHABLE = "unreachable"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """The result of trying one cell.

    :ivar good: False if messages to the cell would fail
    """

    state: str
    detail: str
    good: bool


class CellCheck(base.ListCommand):
    """Try to reach the message broker of each cell.

    The command connects as a request would, and sends nothing. Its exit status
    is 0 only if it reached every broker. Cells without a queue do not count.
    """

    names = ("uuid", "name", "transport_url", "state", "detail", "seconds")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "cells",
            metavar="CELL",
            nargs="*",
            type=arguments.cell,
            help="UUID or name of a cell to check. Default: all cells.",
        )
        parser.add_argument(
            "--timeout",
            metavar="SECONDS",
            type=arguments.seconds,
            default=10.0,
            help="Longest wait for one broker, in seconds. Default: 10. The "
            f"command tries {_AT_ONCE} brokers at once.",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Return a row for each cell."""
        configuration = self.configuration
        chosen = self._chosen(parsed_args.cells)
        attempts = Attempts(configuration, parsed_args.timeout)
        rows = []
        for cell, finding, seconds in attempts.run(chosen):
            if not finding.good:
                self.status = 1
            rows.append(
                [
                    cell.uuid,
                    cell.name,
                    cells.shown(cell.transport_url),
                    finding.state,
                    finding.detail,
                    None if seconds is None else round(seconds, 3),
                ]
            )
        return self.names, rows

    def _chosen(self, wanted: Sequence[str]) -> list[CellMapping]:
        known = self.configuration.cells()
        return [base.chosen(known, name) for name in wanted] or known


class Attempts:
    """Tries to connect to the brokers of cells.

    :param timeout: longest wait for one broker, in seconds
    """

    def __init__(
        self, configuration: base.Configuration, timeout: float
    ) -> None:
        self._expand = configuration.expand
        self._timeout = timeout
        self._workers = Workers(name="cellmw-check")
        self._transports = oslo.OsloTransports(
            configuration.conf, (), self._workers
        )

    def run(
        self, chosen: Sequence[CellMapping]
    ) -> Iterator[tuple[CellMapping, Finding, float | None]]:
        """Try the cells, and yield the results in the same order."""
        waiting = collections.deque(chosen)
        while waiting:
            batch = [
                (cell, self._start(self._expand(cell)))
                for cell in (
                    waiting.popleft()
                    for _ in range(min(_AT_ONCE, len(waiting)))
                )
            ]
            deadline = time.monotonic() + self._timeout
            for cell, attempt in batch:
                if isinstance(attempt, Finding):
                    yield cell, attempt, None
                    continue
                left = deadline - time.monotonic()
                if not attempt.wait(left):
                    yield cell, self._timed_out(), self._timeout
                elif attempt.error is not None:
                    detail = redaction.describe(attempt.error)
                    yield cell, Finding(_UNREACHABLE, detail, good=False), None
                else:
                    yield (cell, *attempt.result)
        self._workers.close()

    def _start(self, cell: Cell) -> Job | Finding:
        if cell.generation is not None:
            return self._workers.submit(self._try, cell.generation)
        assert cell.refusal is not None
        error, reason = cell.refusal
        if error is exceptions.CellHasNoQueue:
            return Finding("no queue", "nothing is sent to it", good=True)
        return Finding("misconfigured", reason, good=False)

    def _timed_out(self) -> Finding:
        return Finding(
            _UNREACHABLE, f"no answer within {self._timeout:g} s", good=False
        )

    def _try(self, generation: Generation) -> tuple[Finding, float]:
        start = time.monotonic()
        try:
            transport = self._transports.open(generation, True)
        except exceptions.CellMisconfigured as error:
            return Finding("misconfigured", error.cause, good=False), 0.0
        finding = _connect(transport)
        seconds = time.monotonic() - start
        # Closing may hang where connecting did not.
        self._workers.submit(transport.cleanup)
        return finding, seconds


def _connect(transport: oslo_messaging.RPCTransport) -> Finding:
    try:
        tried = driver.connect(transport)
    except exceptions.CellMisconfigured as error:
        return Finding("misconfigured", error.cause, good=False)
    except Exception as error:
        return Finding(_UNREACHABLE, redaction.describe(error), good=False)
    if tried:
        return Finding("reachable", "", good=True)
    return Finding(
        "not tried",
        "this driver connects only to send a message",
        good=False,
    )
