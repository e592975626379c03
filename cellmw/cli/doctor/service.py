# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Checks of a filter's options and configuration, and of its libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from oslo_config import cfg

from cellmw import configuration, deploy, options, redaction
from cellmw.cli import base
from cellmw.cli.doctor.findings import Finding, fail, ok, warn
from cellmw.exceptions import CellMWError, ConfigurationError
from cellmw.redaction import Secret
from cellmw.transports.driver import fit


@dataclasses.dataclass(slots=True)
class Service:
    """What one filter is loaded with.

    :ivar conf: None: it cannot be read
    :ivar settings: None: an option cannot be used
    :ivar connection: ``api_database_connection`` of the paste section
    """

    name: str
    conf: cfg.ConfigOpts | None = None
    settings: options.Settings | None = None
    connection: Secret | None = None

    def files(self) -> list[str]:
        """The configuration files in their order."""
        return [] if self.conf is None else configuration.files_of(self.conf)


def load(
    service: Service,
    global_conf: Mapping[str, Any],
    local_conf: Mapping[str, Any],
    sources: list[str],
) -> Iterator[Finding]:
    """Read a filter's configuration and load the filter, as Paste would.

    :param service: is filled in
    :param sources: what the command was given; empty: what the filter names
    """
    paste, source, connection = deploy.divide(global_conf, local_conf)
    service.connection = connection if isinstance(connection, Secret) else None
    yield from _configuration(service, source, sources)
    if service.conf is None:
        return
    for name in deploy.dropped(global_conf, local_conf):
        yield warn(
            service.name,
            f"{name} stands in [DEFAULT] of the paste file, and a line of "
            "that name in the filter's section has no effect",
            f"take {name} out of [DEFAULT]",
        )
    if connection is not None:
        paste[options.PASTE_DATABASE_OPTION] = connection.reveal()
    # A string, which an ini file gives, is refused.
    conf = paste.pop("oslo_config_config", service.conf)
    problem = ""
    try:
        deploy.filter_factory({}, oslo_config_config=conf, **paste)
    except CellMWError as error:
        problem = str(error).removeprefix("cellmw: ")
    except Exception as error:
        problem = redaction.describe(error)
    if problem:
        yield fail(
            service.name,
            f"it cannot be loaded: {problem}",
            "correct that; the service does not start with it",
        )
    else:
        yield ok(service.name, "the filter can be loaded")
    paste.pop(options.PASTE_DATABASE_OPTION, None)
    try:
        service.settings = options.load(service.conf, paste)
    except ConfigurationError:
        return  # it was the problem above


def _configuration(
    service: Service, source: Mapping[str, Any], sources: list[str]
) -> Iterator[Finding]:
    check = f"configuration of {service.name}"
    try:
        if source and not sources:
            service.conf, _ = deploy.read_source(source)
        else:
            service.conf = base.read(sources)
    except CellMWError as error:
        yield fail(check, str(error).removeprefix("cellmw: "), "correct that")
        return
    except Exception as error:
        yield fail(check, base.of_configuration(error), "correct that")
        return
    files = service.files()
    if files:
        yield ok(check, configuration.tell_files_of(service.conf))
    elif service.connection is None:
        yield fail(
            check,
            "no file was read",
            "give the service's files with --config-file, or name them with "
            "oslo_config_file in the filter's section",
        )
    if source and sources:
        yield from _other_files(check, files, source)


def _other_files(
    check: str, files: list[str], source: Mapping[str, Any]
) -> Iterator[Finding]:
    """Whether the filter reads other files than the command was given."""
    try:
        conf, _ = deploy.read_source(source)
        read = configuration.files_of(conf)
    except CellMWError as error:
        yield fail(check, str(error).removeprefix("cellmw: "), "correct that")
        return
    if [*map(_absolute, read)] != [*map(_absolute, files)]:
        names = ", ".join(sorted(source))
        yield warn(
            check,
            f"with {names} in the paste file, the filter does not read what "
            "--config-file and --config-dir name, but "
            f"{configuration.shown(*read) or 'no file at all'}",
            f"correct {names}, or leave out --config-file to check what the "
            "filter reads",
        )


def _absolute(file: str) -> Path:
    return Path(file).expanduser().resolve()


def unknown_options(files: list[str]) -> Iterator[Finding]:
    """What stands in ``[cellmw]`` of the files and has no meaning."""
    check = "options in [cellmw]"
    found = configuration.unknown_options(files)
    for file, name, nearest in sorted(found):
        yield warn(
            check,
            f"{name} in {file} is no option, and has no effect",
            f"write {nearest} if that was meant, or take the line out",
        )
    if files and not found:
        yield ok(check, "all are known")


def libraries() -> Iterator[Finding]:
    """The libraries whose inside this package relies on."""
    misfits = fit.misfits()
    if misfits:
        yield warn(
            "libraries",
            f"{fit.installed()} differ from those that were tried in "
            f"{', '.join(misfits)}; each message to RabbitMQ is handed to a "
            "worker thread, and a failure says that it may have been "
            "delivered",
            f"install versions that were tried: {fit.TRIED}",
        )
    for name, version, was_tried in fit.libraries():
        if was_tried:
            yield ok(f"library {name}", f"{version} was tried")
        else:
            yield warn(
                f"library {name}",
                f"{version} was not tried (tried: {fit.tried(name)})",
                "install a version that was tried, or try this one in a test "
                "environment first",
            )
