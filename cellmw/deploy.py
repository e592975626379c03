# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The filter factory: the only place that wires the parts together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from oslo_config import cfg

from cellmw import options, redaction, runtime
from cellmw.cells import store
from cellmw.exceptions import ConfigurationError
from cellmw.middleware import CellMW
from cellmw.transports import oslo

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


def filter_factory(
    global_conf: Mapping[str, Any] | None,
    *,
    oslo_config_config: cfg.ConfigOpts | None = None,
    **local_conf: Any,
) -> Callable[[WSGIApplication], CellMW]:
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
    paste = dict(local_conf)
    connection = paste.pop(options.PASTE_DATABASE_OPTION, None)
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
    settings = options.load(conf, paste)
    oslo.prepare(conf)
    store.register_options(conf)
    secret = _database(conf, connection)
    redaction.install()
    found = runtime.registry().get(
        (settings, identity, connection and secret),
        lambda: runtime.Runtime(
            settings, conf, secret if connection else None
        ),
    )

    def make_filter(application: WSGIApplication) -> CellMW:
        return CellMW(application, found)

    return make_filter


def _refuse_eventlet() -> None:
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.already_patched:
        raise ConfigurationError(
            "cellmw: eventlet has monkey patched this process; this filter "
            "needs native threads. Serve the API with a threading WSGI "
            "server, without eventlet.monkey_patch()."
        )


def _read(
    source: Mapping[str, str],
) -> tuple[cfg.ConfigOpts, tuple[Any, ...]]:
    """The configuration, and what makes two of them the same."""
    if not source:
        return cfg.CONF, ("object", id(cfg.CONF))
    conf = cfg.ConfigOpts()
    file = source.get("oslo_config_file")
    problem = ""
    try:
        conf(
            [],
            project=source.get("oslo_config_project"),
            prog=source.get("oslo_config_program"),
            default_config_files=[file] if file else None,
            validate_default_values=True,
        )
    except cfg.ConfigFilesNotFoundError as error:
        problem = f"no such file: {', '.join(error.config_files)}"
    except cfg.ConfigFilesPermissionDeniedError as error:
        problem = f"no permission to read {', '.join(error.config_files)}"
    except (cfg.Error, ValueError, OSError) as error:
        # Their messages quote the line that they stumbled over.
        problem = f"it cannot be read ({type(error).__name__})"
    if problem:
        names = ", ".join(f"{k} = {v}" for k, v in source.items())
        raise ConfigurationError(
            f"cellmw: configuration from {names}: {problem}"
        )
    return conf, ("source", *sorted(source.items()), *conf.config_file)


def _database(
    conf: cfg.ConfigOpts, connection: str | None
) -> redaction.Secret:
    url = redaction.Secret(connection or conf[store.GROUP].connection or "")
    if not url:
        raise ConfigurationError(
            "cellmw: no API database is configured; set connection in "
            f"[{store.GROUP}] of the service's configuration, or "
            f"{options.PASTE_DATABASE_OPTION} in the filter's paste section"
        )
    # Made and thrown away: it imports the driver, so that the first request
    # does not pay for that, and finds out what cannot work.  It connects to
    # nothing.
    store.make_engine(conf, url.reveal())
    return url
