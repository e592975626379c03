# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Making oslo.messaging transports; the only module that does."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import oslo_messaging
from oslo_config import cfg
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions
from cellmw.cells.mapping import Generation
from cellmw.transports import driver, url_options
from cellmw.workers import Workers

# How long the broker keeps the reply queue of a transport that was made for
# one request.  oslo.messaging's default of 1800 s, meant for reconnecting,
# would let them pile up.  Seconds.
ONE_REQUEST_QUEUE_TTL = 2

_GLOBAL_ONLY_GROUPS = ("oslo_messaging_metrics", "oslo_messaging_tracing")


def known_drivers() -> frozenset[str]:
    """The transport URL schemes that have a driver installed."""
    found = importlib.metadata.entry_points(group="oslo.messaging.drivers")
    return frozenset(entry.name for entry in found)


class _ConfOnly(RPCTransport):
    """As much of a transport as an RPCClient wants when it is made."""

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self.conf = conf


def prepare(conf: cfg.ConfigOpts) -> None:
    """Register on a configuration what sending reads from it.

    oslo.messaging registers some groups on the global configuration only, and
    a send with a private one fails for want of them.  May be called again.

    :raises ConfigurationError: it asks for a queue manager that cannot work
    """
    driver.check()
    driver.prepare_queue_manager(conf)
    oslo_messaging.TransportURL(conf)
    oslo_messaging.get_rpc_client(
        _ConfOnly(conf), oslo_messaging.Target(topic="none")
    )
    if conf is cfg.CONF:
        return
    for name in _GLOBAL_ONLY_GROUPS:
        group = cfg.CONF._groups.get(name)
        for info in group._opts.values() if group is not None else ():
            try:
                conf.register_opt(info["opt"], group=name)
            except cfg.DuplicateOptError:
                continue  # the service has its own


def base_url(conf: cfg.ConfigOpts) -> str | None:
    """``[DEFAULT] transport_url``, where anybody has set it.

    oslo.messaging's default is taken for none: it has a scheme and nothing
    else, so that a template over it would lead to another vhost.
    """
    found = conf.get_location("transport_url")
    if found is not None and found.location is cfg.Locations.opt_default:
        return None
    url: str | None = conf.transport_url
    return url


def open_default(
    conf: cfg.ConfigOpts, allowed_remote_exmods: list[str]
) -> RPCTransport:
    """The service's own transport, of ``[DEFAULT] transport_url``.

    Raises what oslo.messaging raises.
    """
    return oslo_messaging.get_rpc_transport(
        conf, allowed_remote_exmods=allowed_remote_exmods
    )


class OsloTransports:
    """Opens transports with one configuration.  Thread-safe.

    :param conf: prepared by :func:`prepare`
    :param allowed_remote_exmods: modules whose exceptions may come back
    :param workers: where connections are closed
    """

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        allowed_remote_exmods: tuple[str, ...],
        workers: Workers,
    ) -> None:
        self._conf = conf
        self._workers = workers
        self._allowed_remote_exmods = list(allowed_remote_exmods)

    def open(self, generation: Generation, one_request: bool) -> RPCTransport:
        """Open a transport.  Opens no socket yet; the first send does.

        :param one_request: it serves one request and is closed then
        :raises CellMisconfigured: the URL, its driver or its query part
            cannot be used
        """
        made = self._make(generation, one_request)
        if isinstance(made, RPCTransport):
            return made
        raise exceptions.CellMisconfigured(
            made, cell_uuid=generation.cell_uuid
        )

    def _make(
        self, generation: Generation, one_request: bool
    ) -> RPCTransport | str:
        """The transport, or why there is none.

        It returns that instead of raising, for this frame knows the URL and
        must not be part of a traceback.
        """
        try:
            url = oslo_messaging.TransportURL.parse(
                self._conf, generation.url.reveal()
            )
        except (oslo_messaging.InvalidTransportURL, ValueError):
            # The message of either may quote a part of it.
            return "its URL cannot be parsed"
        try:
            if one_request and self._names_queues_anew(url):
                url.query.setdefault(
                    "rabbit_transient_queues_ttl", str(ONE_REQUEST_QUEUE_TTL)
                )
            transport = oslo_messaging.get_rpc_transport(
                self._conf,
                url,
                allowed_remote_exmods=self._allowed_remote_exmods,
            )
            reason = ""
            if driver.install(transport, self._later):
                reason = url_options.rabbit_problem(
                    transport._driver.conf[url_options.RABBIT], url.query
                )
            return reason or transport
        except Exception as error:
            return self._why_not(url, error)

    def _why_not(
        self, url: oslo_messaging.TransportURL, error: Exception
    ) -> str:
        """Why no transport could be made.

        The error itself may quote a part of the URL.
        """
        return (
            url_options.missing_package(url.transport)
            or url_options.refusal(self._conf, url)
            or f"its driver cannot be used ({type(error).__name__})"
        )

    def _names_queues_anew(self, url: oslo_messaging.TransportURL) -> bool:
        """Whether each transport to RabbitMQ has a reply queue of its own.

        With a queue manager the name is the process's for ever, and a queue
        is not declared again with other arguments.
        """
        scheme = url.transport.partition("+")[0]
        return scheme in ("rabbit", "kombu", "amqp") and not (
            driver.keeps_queue_names(self._conf, url)
        )

    def _later(self, function: Callable[[], Any]) -> bool:
        job = self._workers.submit(function)
        return job.thread_id is not None or not job.done
