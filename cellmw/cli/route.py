# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The command ``cellmw-manage route``, which explains a request.

It uses the code of a request for each step, but asks the database itself,
because only a running process knows what it remembers.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any
from urllib import parse

import sqlalchemy as sa
from oslo_db import exception as db_exception

from cellmw import exceptions, instance_path, lenient_path
from cellmw.cells import urls
from cellmw.cells.directory import SAFE_METHODS
from cellmw.cells.mapping import CellMapping
from cellmw.cli import arguments, base, cells

_Step = tuple[str, str, str]


class Route(base.ListCommand):
    """Explain what a request for a URL would get, and why.

    The command sends nothing. It explains a request whose identity is
    confirmed, and does not read the options in the filter's paste section.
    """

    names = ("step", "found", "meaning")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "url",
            metavar="URL",
            help="URL or path of a request.",
        )
        parser.add_argument(
            "--method",
            type=_method,
            default="GET",
            help="HTTP method of the request. Default: GET.",
        )
        parser.add_argument(
            "--script-name",
            metavar="PREFIX",
            default="",
            help="Path at which the service is mounted (SCRIPT_NAME), for "
            "example /compute, without a version such as /v2.1.",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Return the steps."""
        path = _path(parsed_args.url, parsed_args.script_name)
        explanation = _Explanation(self.configuration, parsed_args.method)
        rows = list(explanation.steps(path))
        if explanation.failure is not None:
            self.status = 1
            arguments.complain(
                self.app.stderr, self.about_database(explanation.failure)
            )
        return self.names, rows


def _method(text: str) -> str:
    if not text.isascii() or not text.isalpha():
        raise argparse.ArgumentTypeError("it is not a method")
    return text.upper()


def _path(url: str, script_name: str) -> str:
    """Return the PATH_INFO of a request for a URL."""
    try:
        parts = parse.urlsplit(url)
    except ValueError:
        raise base.Failed("this is not a URL") from None
    if parts.scheme not in ("", "http", "https") or not parts.path.startswith(
        "/"
    ):
        raise base.Failed(
            "this is neither an http URL with a path, nor a path"
        )
    # A server decodes it once (PEP 3333), byte by byte.
    path = parse.unquote(parts.path, "latin-1")
    prefix = script_name.rstrip("/")
    if not f"{path}/".startswith(f"{prefix}/"):
        raise base.Failed("the path does not begin with --script-name")
    return path[len(prefix) :]


class _Explanation:
    """The steps of one request.

    :ivar failure: why the database could not be queried
    """

    def __init__(self, configuration: base.Configuration, method: str) -> None:
        self._configuration = configuration
        self._settings = configuration.settings
        self._method = method
        self.failure: Exception | None = None

    def steps(self, path: str) -> Iterator[_Step]:
        """Yield the steps."""
        uuid, pattern = self._match(path)
        if uuid is None and self._is_ambiguous(path):
            yield (
                "path",
                path,
                "no pattern of instance_path_patterns matches, but another "
                f"reader could see an instance in it{self._hint(path)}",
            )
            yield (
                "request",
                "mq_connection refuses to send, cell_uuid None",
                "AmbiguousPath: the database is not queried",
            )
            return
        if uuid is None:
            yield (
                "path",
                path,
                "no pattern of instance_path_patterns matches"
                f"{self._hint(path)}",
            )
            yield (
                "request",
                "untouched",
                "the filter does not query the database; it leaves an "
                "existing context alone, and a context that it makes has "
                "mq_connection None",
            )
            return
        yield ("path", path, f"instance_path_patterns, line {pattern}")
        yield ("instance", uuid, "its mapping is looked up")
        try:
            known = self._configuration.cells()
            found = self._configuration.store.cell_of(uuid)
        except (db_exception.DBError, sa.exc.SQLAlchemyError) as error:
            self.failure = error
        if self.failure is not None:
            yield self._lookup_failed()
            return
        cells: dict[str | None, CellMapping] = {
            cell.uuid: cell for cell in known
        }
        yield from self._mapped(uuid, found, cells)
        yield self._memory(known=found is not None and found[1] in cells)

    def _is_ambiguous(self, path: str) -> bool:
        patterns = self._settings.instance_path_patterns
        return bool(
            instance_path.quick_check(patterns)(path)
        ) and lenient_path.checker(patterns)(path)

    def _hint(self, path: str) -> str:
        """Suggest --script-name if another prefix would match."""
        find = instance_path.finder(self._settings.instance_path_patterns)
        for found in re.finditer("/", path):
            if found.start() and find(path[found.start() :]):
                prefix = path[: found.start()]
                return (
                    f"; if the service is mounted at {prefix}, give "
                    f"--script-name {prefix}"
                )
        return ""

    def _match(self, path: str) -> tuple[str | None, int]:
        patterns = self._settings.instance_path_patterns
        uuid = instance_path.finder(patterns)(path)
        for line, pattern in enumerate(patterns, 1):
            if uuid and instance_path.finder([pattern])(path) == uuid:
                return uuid, line
        return uuid, 0

    def _lookup_failed(self) -> _Step:
        outcome = (
            "503, unless the process remembers the instance"
            if self._settings.on_lookup_failure == "fail"
            else "mq_connection refuses to send, unless the process "
            "remembers the instance"
        )
        return (
            "mapping",
            "the API database cannot be queried",
            f"{outcome} (on_lookup_failure = "
            f"{self._settings.on_lookup_failure})",
        )

    def _mapped(
        self,
        uuid: str,
        found: tuple[int, str | None] | None,
        cells: dict[str | None, CellMapping],
    ) -> Iterator[_Step]:
        if found is None:
            there = self._configuration.changes.instance(uuid)
            what = "there is none" if there is None else "it has no cell yet"
            yield ("mapping", what, "the instance is in no cell")
            if self._settings.on_no_cell == "refuse":
                yield (
                    "request",
                    "mq_connection refuses to send, cell_uuid None",
                    "on_no_cell = refuse",
                )
            else:
                yield (
                    "request",
                    "mq_connection None, cell_uuid None",
                    "messages go to the default transport",
                )
            return
        cell_id, cell_uuid = found
        cell = cells.get(cell_uuid)
        if cell is None:
            yield ("mapping", f"cell id {cell_id}", "there is no such cell")
            yield (
                "request",
                "mq_connection refuses to send, cell_uuid None",
                "CellNotFound: the cell of the mapping does not exist",
            )
            return
        queued = self._configuration.changes.instance(uuid)
        note = (
            "; the instance is queued for delete (still receives messages)"
            if queued is not None and queued.queued_for_delete
            else ""
        )
        yield ("mapping", f"cell {cell.uuid}", f"cell_id {cell_id}{note}")
        yield from self._cell(cell)

    def _cell(self, cell: CellMapping) -> Iterator[_Step]:
        note = (
            "disabled (still receives messages)"
            if cell.disabled
            else "enabled"
        )
        name = f" ({cell.name})" if cell.name else ""
        yield ("cell", f"{cell.uuid}{name}", note)
        expanded = self._configuration.outcome(cell)
        written = cell.transport_url.reveal() if cell.transport_url else ""
        yield (
            "transport_url",
            cells.shown(cell.transport_url) or "empty",
            "a template, filled in from [DEFAULT] transport_url"
            if urls.is_template(written)
            else "not a template",
        )
        if expanded.refusal is not None:
            error, reason = expanded.refusal
            because = (
                "cell0 has no queue"
                if error is exceptions.CellHasNoQueue
                else reason
            )
            yield (
                "request",
                f"mq_connection refuses to send, cell_uuid {cell.uuid}",
                f"{error.__name__}: {because}",
            )
            return
        assert expanded.generation is not None
        filled = expanded.generation.url
        yield ("filled in", cells.shown(filled) or "", "the URL to connect to")
        broker = urls.broker_of(filled.reveal())
        yield ("driver", broker.driver, "oslo.messaging has it installed")
        yield (
            "request",
            f"mq_connection for this cell, cell_uuid {cell.uuid}",
            "the first message connects; try it with "
            "'cellmw-manage cell check'",
        )

    def _memory(self, *, known: bool) -> _Step:
        """Describe what a process remembers of the answer.

        :param known: whether the instance is in an existing cell
        """
        settings = self._settings
        ttl = settings.instance_cache_ttl
        interval = settings.cell_refresh_interval
        if not known:
            found = "the instance: never, because its cell is not known"
        elif not ttl:
            found = "the instance: never (instance_cache_ttl = 0)"
        elif (
            settings.instance_cache_for == "safe"
            and self._method not in SAFE_METHODS
        ):
            found = (
                f"the instance: not for {self._method} "
                "(instance_cache_for = safe)"
            )
        else:
            found = f"the instance: for up to {ttl:g} s (instance_cache_ttl)"
        return (
            "memory",
            f"{found}; the cells: read again after {interval:g} s "
            "(cell_refresh_interval)",
            "each running process has its own memory and may use what it read "
            "before; it keeps using the known cells while it cannot reach the "
            "database",
        )
