# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The filter factory: the only place that wires the parts together."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from oslo_config import cfg

from cellmw import configuration, nova, options, redaction, runtime
from cellmw.cells import databases, engines
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
    # The frame of this function becomes part of a traceback.
    given = [(global_conf or {}, local_conf, oslo_config_config)]
    del global_conf, local_conf, oslo_config_config
    loaded = _load_or_say(*given.pop())
    if isinstance(loaded, BaseException):
        raise loaded
    return loaded


def _load_or_say(
    *given: Any,
) -> Callable[[WSGIApplication], WSGIApplication] | BaseException:
    """Load, or return why not: the frames of loading know connections."""
    try:
        return _load(*given)
    except Exception as error:
        return redaction.made_safe(error)


def _load(
    global_conf: Mapping[str, Any],
    local_conf: Mapping[str, Any],
    oslo_config_config: Any,
) -> Callable[[WSGIApplication], WSGIApplication]:
    _refuse_patched_process()
    _warn_of_default(global_conf, local_conf)
    paste, source, connection = divide(global_conf, local_conf)
    if oslo_config_config is None:
        # Paste gives strings only, which are refused below.
        oslo_config_config = global_conf.get("oslo_config_config")
    if oslo_config_config is None:
        conf, identity = read_source(source)
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
    redaction.install(settings.scrub_loggers, settings.scrub_loggers_except)

    def make_runtime() -> runtime.Runtime:
        _warn_of_unknown(conf)
        return runtime.Runtime(settings, conf, database)

    found = runtime.registry().get(key, make_runtime)
    if settings.nova_cell_cache:
        nova.place(found.process)

    def make_filter(application: WSGIApplication) -> WSGIApplication:
        if settings.mode == "observe":
            return Observing(
                application, settings, lambda: found.process().observer
            )
        return CellMW(application, found)

    return make_filter


def divide(
    global_conf: Mapping[str, Any], local_conf: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Take apart what Paste gives a filter.

    :returns: options of ``[cellmw]``; those that say where the configuration
        is; and the API database's URL, as a Secret where it is a string
    """
    paste = dict(local_conf)
    connection = paste.pop(options.PASTE_DATABASE_OPTION, None)
    if isinstance(connection, str):
        connection = redaction.Secret(connection)
    source = {
        name: value
        for name in options.PASTE_SOURCE_OPTIONS
        if (value := paste.pop(name, global_conf.get(name)))
    }
    return paste, source, connection


def _prepare(
    settings: options.Settings, conf: cfg.ConfigOpts
) -> options.Settings:
    """Have ready what the settings need; gives the settings that hold."""
    oslo.prepare(conf)
    engines.register_options(conf)
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


def _refuse_patched_process() -> None:
    """Stop where green threads stand in for those of the system."""
    eventlet = sys.modules.get("eventlet.patcher")
    gevent = sys.modules.get("gevent.monkey")
    if eventlet is not None and eventlet.already_patched:
        name, call = "eventlet", "eventlet.monkey_patch()"
    elif gevent is not None and gevent.saved:
        name, call = "gevent", "gevent.monkey.patch_all()"
    else:
        return
    raise ConfigurationError(
        f"cellmw: {name} has monkey patched this process; this filter needs "
        "native threads. Serve the API with a threading WSGI server, without "
        f"{call}."
    )


def _warn_of_default(
    global_conf: Mapping[str, Any], local_conf: Mapping[str, Any]
) -> None:
    for name in dropped(global_conf, local_conf):
        LOG.warning(
            "cellmw: paste option %(name)s is not used: it stands in "
            "[DEFAULT], which supplies oslo_config_* only, and Paste "
            "ignores a line of that name in the filter's section. Take "
            "it out of [DEFAULT], or write two lines in the section: "
            "'set %(name)s = VALUE' and 'get %(name)s = %(name)s'",
            {"name": name},
        )


def dropped(
    global_conf: Mapping[str, Any], local_conf: Mapping[str, Any]
) -> list[str]:
    """The options of ours that stand in Paste's ``[DEFAULT]`` in vain.

    Paste drops a line of the section whose name also stands in ``[DEFAULT]``.
    What the section says with ``set`` looks like one of ``[DEFAULT]``'s, too.
    """
    ours = [opt.name for opt in options.OPTS]
    return [
        name
        for name in (*ours, options.PASTE_DATABASE_OPTION)
        if name in global_conf and name not in local_conf
    ]


def _warn_of_unknown(conf: cfg.ConfigOpts) -> None:
    # oslo.config ignores them without a word.
    files = configuration.files_of(conf)
    for file, name, nearest in configuration.unknown_options(files):
        LOG.warning(
            "cellmw: unknown option %s in [%s] of %s has no effect; the "
            "nearest known one is %s",
            name,
            options.GROUP,
            file,
            nearest,
        )


def read_source(
    source: Mapping[str, Any],
) -> tuple[cfg.ConfigOpts, tuple[Any, ...]]:
    """The configuration that ``oslo_config_*`` name, as the filter reads it.

    :param source: paste options; none: oslo.config's global configuration
    :returns: it, and what makes two of them the same
    :raises ConfigurationError: it cannot be read
    """
    if not source:
        return cfg.CONF, ("object", id(cfg.CONF))
    arguments = configuration.arguments_of(source)
    names = {}
    for name in ("oslo_config_project", "oslo_config_program"):
        names[name] = source.get(name)
        if not isinstance(names[name], str | None):
            raise ConfigurationError(
                f"cellmw: {name} has a bad value; accepted: a string"
            )
    given = ", ".join(
        f"{name} = {configuration.shown(str(value))}"
        for name, value in source.items()
    )
    conf = configuration.read(
        arguments,
        project=names["oslo_config_project"],
        program=names["oslo_config_program"],
        where=f"cellmw: configuration from {given}: ",
    )
    return conf, (
        *("source", arguments, *names.values()),
        *configuration.files_of(conf),
    )


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
        engines.option(conf, "connection") or ""
    )
    if not url:
        raise ConfigurationError(
            "cellmw: no API database is configured; set connection in "
            f"[{engines.GROUP}] of the service's configuration, or "
            f"{options.PASTE_DATABASE_OPTION} in the filter's paste section "
            f"({configuration.tell_files_of(conf)})"
        )
    # Made and thrown away: it imports the driver, so that the first request
    # does not pay for that, and finds out what cannot work.  It connects to
    # nothing.
    engines.make_engine(conf, connection)
    return url
