# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The filter factory: the only place that wires the parts together."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from oslo_config import cfg

from cellmw import nova, options, redaction, runtime
from cellmw.cells import databases, store
from cellmw.exceptions import ConfigurationError
from cellmw.middleware import CellMW
from cellmw.observe import Observing
from cellmw.transports import oslo

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

LOG = logging.getLogger(__name__)


def filter_factory(
    global_conf: Mapping[str, Any] | None,
    *,
    oslo_config_config: cfg.ConfigOpts | None = None,
    **local_conf: Any,
) -> Callable[[WSGIApplication], WSGIApplication]:
    """Make the filter, for Paste (``paste.filter_factory``).

    Opens no connection and starts no thread.  Filters with equal settings
    share what they have.

    :param global_conf: Paste's ``[DEFAULT]``, of which only ``oslo_config_*``
        are looked at
    :param oslo_config_config: the configuration itself, from Python only
    :param local_conf: the filter's own section
    :raises ConfigurationError: it cannot work as it is configured
    """
    _refuse_eventlet()
    _warn_of_default(global_conf or {}, local_conf)
    paste = dict(local_conf)
    connection = paste.pop(options.PASTE_DATABASE_OPTION, None)
    del local_conf  # this frame becomes part of a traceback
    if isinstance(connection, str):
        connection = redaction.Secret(connection)
    source = {
        name: value
        for name in options.PASTE_SOURCE_OPTIONS
        if (value := paste.pop(name, (global_conf or {}).get(name)))
    }
    if oslo_config_config is None:
        # Paste gives strings only, which are refused below.
        oslo_config_config = (global_conf or {}).get("oslo_config_config")
    if oslo_config_config is None:
        conf, identity = _read(source)
    elif isinstance(oslo_config_config, cfg.ConfigOpts):
        conf, identity = oslo_config_config, ("object", id(oslo_config_config))
    else:
        raise ConfigurationError(
            "cellmw: oslo_config_config takes a ConfigOpts from Python, not "
            "a string; in an ini file use one of "
            f"{', '.join(options.PASTE_SOURCE_OPTIONS)}"
        )
    settings = _prepare(options.load(conf, paste), conf)
    database = _database(conf, connection)
    # The same source may say something else by now.
    key = (settings, identity, database, _transport_url(conf))
    redaction.install()
    found = runtime.registry().get(
        key, lambda: runtime.Runtime(settings, conf, database)
    )
    if settings.nova_cell_cache:
        nova.place(found.process)

    def make_filter(application: WSGIApplication) -> WSGIApplication:
        if settings.mode == "observe":
            return Observing(
                application, settings, lambda: found.process().observer
            )
        return CellMW(application, found)

    return make_filter


def _prepare(
    settings: options.Settings, conf: cfg.ConfigOpts
) -> options.Settings:
    """Have ready what the settings need; gives the settings that hold."""
    oslo.prepare(conf)
    store.register_options(conf)
    if settings.mode == "observe":
        # It leaves contexts and Nova alone.
        settings = dataclasses.replace(
            settings, nova_cell_cache=False, db_connection=False
        )
    if settings.nova_cell_cache:
        settings = nova.prepare(settings)
    if settings.db_connection or settings.nova_cell_cache:
        databases.prepare(conf)
    return settings


def _refuse_eventlet() -> None:
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.already_patched:
        raise ConfigurationError(
            "cellmw: eventlet has monkey patched this process; this filter "
            "needs native threads. Serve the API with a threading WSGI "
            "server, without eventlet.monkey_patch()."
        )


def _warn_of_default(
    global_conf: Mapping[str, Any], local_conf: Mapping[str, Any]
) -> None:
    # Paste drops a line of the section whose name also stands in [DEFAULT].
    # What the section says with "set" looks like one of [DEFAULT]'s, too.
    ours = [opt.name for opt in options.OPTS]
    for name in (*ours, options.PASTE_DATABASE_OPTION):
        if name in global_conf and name not in local_conf:
            LOG.warning(
                "cellmw: paste option %(name)s is not used: it stands in "
                "[DEFAULT], which supplies oslo_config_* only, and Paste "
                "ignores a line of that name in the filter's section. Take "
                "it out of [DEFAULT], or write two lines in the section: "
                "'set %(name)s = VALUE' and 'get %(name)s = %(name)s'",
                {"name": name},
            )


def _read(
    source: Mapping[str, Any],
) -> tuple[cfg.ConfigOpts, tuple[Any, ...]]:
    """The configuration, and what makes two of them the same."""
    if not source:
        return cfg.CONF, ("object", id(cfg.CONF))
    for name, value in source.items():
        if not isinstance(value, str):
            raise ConfigurationError(
                f"cellmw: {name} has a bad value; accepted: a string"
            )
    conf = cfg.ConfigOpts()
    file = source.get("oslo_config_file")
    problem = ""
    try:
        conf(
            [],
            project=source.get("oslo_config_project"),
            prog=source.get("oslo_config_program"),
            default_config_files=[file] if file else None,
            # Else oslo.config looks for some by the program's name.
            default_config_dirs=[] if file else None,
            validate_default_values=True,
        )
    except cfg.ConfigFilesNotFoundError as error:
        problem = f"no such file: {_shown(*error.config_files)}"
    except cfg.ConfigFilesPermissionDeniedError as error:
        problem = f"no permission to read {_shown(*error.config_files)}"
    except (cfg.Error, ValueError, OSError) as error:
        # Their messages quote the line that they stumbled over.
        problem = f"it cannot be read ({type(error).__name__})"
    if problem:
        names = ", ".join(f"{k} = {_shown(v)}" for k, v in source.items())
        raise ConfigurationError(
            f"cellmw: configuration from {names}: {problem}"
        )
    return conf, ("source", *sorted(source.items()), *conf.config_file)


def _shown(*values: str) -> str:
    """Paths and names; or a connection string under the wrong name."""
    # In a path that was made absolute, "://" has become ":/".
    hidden = [
        redaction.redact_url(value)
        if ":" in value and "@" in value
        else redaction.scrub(value)
        for value in values
    ]
    return redaction.one_line(", ".join(hidden))


def _transport_url(conf: cfg.ConfigOpts) -> redaction.Secret:
    try:
        return redaction.Secret(conf.transport_url or "")
    except (cfg.Error, ValueError):
        # Its text quotes what stands behind a "$".
        pass
    raise ConfigurationError(
        "cellmw: option transport_url in [DEFAULT] has a bad value; "
        "accepted: a URL, each $ in it written as $$"
    )


def _database(conf: cfg.ConfigOpts, connection: Any) -> redaction.Secret:
    if connection is not None and not isinstance(connection, redaction.Secret):
        raise ConfigurationError(
            f"cellmw: paste option {options.PASTE_DATABASE_OPTION} has a bad "
            "value; accepted: a database URL, as a string"
        )
    url = connection or redaction.Secret(
        store.option(conf, "connection") or ""
    )
    if not url:
        raise ConfigurationError(
            "cellmw: no API database is configured; set connection in "
            f"[{store.GROUP}] of the service's configuration, or "
            f"{options.PASTE_DATABASE_OPTION} in the filter's paste section"
        )
    # Made and thrown away: it imports the driver, so that the first request
    # does not pay for that, and finds out what cannot work.  It connects to
    # nothing.
    store.make_engine(conf, connection)
    return url
