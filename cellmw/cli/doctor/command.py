# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The command ``cellmw-manage doctor``: which checks, in which order."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from cliff.formatters.base import ListFormatter
from oslo_config import cfg
from stevedore import ExtensionManager
from stevedore.extension import Extension

from cellmw import exceptions, options
from cellmw.cli import arguments, base
from cellmw.cli.doctor import paste, pipelines, service, sites, sizes
from cellmw.cli.doctor.findings import FAIL, Finding, Lines, fail, warn
from cellmw.cli.doctor.service import Service

_LINE = "line"


class Doctor(base.ListCommand):
    """Check a service's configuration, paste file and cells.

    The command prints a line for each check, OK, WARN or FAIL, and below it
    what to do. It connects to the API database and to the broker of each cell,
    and changes nothing. It exits with 0 unless a line says FAIL.
    """

    names = ("status", "check", "finding", "advice")

    @property
    def formatter_default(self) -> str:
        """A line for each check."""
        return _LINE

    def _load_formatter_plugins(self) -> ExtensionManager[ListFormatter]:
        # cliff has a method for this, which is not public.
        found = super()._load_formatter_plugins()
        entry_point = importlib.metadata.EntryPoint(
            _LINE, f"{Lines.__module__}:{Lines.__name__}", ""
        )
        lines = Extension(_LINE, entry_point, Lines, Lines())
        return ExtensionManager.make_test_instance([*found, lines])

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--paste-file",
            metavar="FILE",
            help="Paste file of the service, for example api-paste.ini. "
            "Without --config-file, the command reads the configuration that "
            "the filter's section names there.",
        )
        parser.add_argument(
            "--processes",
            metavar="NUMBER",
            type=arguments.number(1, 100000),
            default=1,
            help="Processes of the service, on all machines. Default: 1.",
        )
        parser.add_argument(
            "--threads",
            metavar="NUMBER",
            type=arguments.number(1, 100000),
            default=1,
            help="Threads that serve requests in one process. Default: 1.",
        )
        parser.add_argument(
            "--timeout",
            metavar="SECONDS",
            type=arguments.seconds,
            default=10.0,
            help="Longest wait for one broker, in seconds. Default: 10.",
        )
        return parser

    def _configure(self, parsed_args: argparse.Namespace) -> str | None:
        # What is wrong with it is a finding.
        return None

    def _close(self) -> None:
        """Each configuration is closed with its checks."""

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Give a row for each finding."""
        rows = []
        for finding in self._findings(parsed_args):
            if finding.status == FAIL:
                self.status = 1
            rows.append(
                (
                    finding.status,
                    finding.check,
                    finding.finding,
                    finding.advice,
                )
            )
        return self.names, rows

    def _findings(self, parsed_args: argparse.Namespace) -> Iterator[Finding]:
        sources = self.sources(parsed_args)
        services: list[Service] = []
        if parsed_args.paste_file is None:
            yield warn(
                "paste file",
                "none was given, so no pipeline was looked at",
                "give it with --paste-file",
            )
            alone = Service("the filter")
            services.append(alone)
            yield from service.load(alone, {}, {}, sources)
        else:
            try:
                yield from _paste(parsed_args.paste_file, sources, services)
            except paste.Unreadable as error:
                yield fail("paste file", str(error), "correct the file")
        files = dict.fromkeys(file for one in services for file in one.files())
        yield from service.unknown_options(list(files))
        yield from service.libraries()
        checked = set()
        for one in services:
            key = (*one.files(), one.connection)
            if one.conf is not None and key not in checked:
                checked.add(key)
                yield from _connections(one, one.conf, parsed_args)


def _paste(
    path: str, sources: list[str], services: list[Service]
) -> Iterator[Finding]:
    """Check a paste file, and the filters of ours in its pipelines.

    :param services: takes what each of these is loaded with
    """
    file = paste.PasteFile(path)
    found = list(file.pipelines())
    yield from pipelines.places(found)
    loaded: dict[str, Service] = {}
    for pipeline in found:
        for name in dict.fromkeys(
            pipeline.steps[n].name for n in pipeline.ours
        ):
            if name not in loaded:
                loaded[name] = Service(f"filter {name}")
                yield from _load(loaded[name], file, name, sources)
            settings = loaded[name].settings
            if settings is not None:
                yield from pipelines.context_key(pipeline, settings, found)
                yield from pipelines.nova(pipeline, settings)
    services += loaded.values()


def _load(
    one: Service, file: paste.PasteFile, name: str, sources: list[str]
) -> Iterator[Finding]:
    try:
        global_conf, local_conf = file.given(name)
    except paste.Unreadable as error:
        yield fail(one.name, str(error), "correct its section")
        return
    yield from service.load(one, global_conf, local_conf, sources)


def _connections(
    one: Service, conf: cfg.ConfigOpts, parsed_args: argparse.Namespace
) -> Iterator[Finding]:
    try:
        configuration = base.Configuration(
            conf,
            settings=one.settings or options.load(_nothing(), {}),
            connection=one.connection,
        )
    except (base.Failed, exceptions.CellMWError):
        return  # why, loading the filter has told
    with contextlib.closing(configuration):
        yield from sites.database(configuration)
        known = sites.known_cells(configuration)
        if known is None:
            return
        yield from sites.cells(configuration, known, parsed_args.timeout)
        with_queue = sum(
            configuration.expand(cell).generation is not None for cell in known
        )
        yield from sizes.check(
            configuration,
            with_queue,
            parsed_args.processes,
            parsed_args.threads,
        )


def _nothing() -> cfg.ConfigOpts:
    """A configuration with all options at their defaults."""
    conf = cfg.ConfigOpts()
    conf([], project="cellmw", default_config_files=[], default_config_dirs=[])
    return conf
