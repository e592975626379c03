# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""RPC clients that follow the context.

An RPC API class keeps its signatures: what it sends goes to the cell of the
context that is passed with each message, and to the service's own queue
where the context names none.

One oslo.messaging client is made and kept for each call of
:func:`get_client`, and none for a message.  It sends through a router, which
finds the transport on the context that the message was serialized with.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import oslo_messaging
from oslo_config import cfg
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions, options, redaction
from cellmw.forks import keep_for_ever
from cellmw.transports import oslo

# What never travels.
_LOCAL_ATTRIBUTES = ("mq_connection", "cell_uuid", "db_connection")


class _Default:
    """The service's own transport, as :func:`init` wants it.

    One for each process: after a fork the parent's is left alone, for its
    sockets are the parent's.
    """

    def __init__(self) -> None:
        self._settings: tuple[cfg.ConfigOpts, list[str]] | None = None
        self._transport: RPCTransport | None = None
        self._hold: redaction.Hold | None = None
        self._pid = 0

    def set_up(self, conf: cfg.ConfigOpts, exmods: list[str]) -> None:
        hold = redaction.KNOWN.hold(
            redaction.Secret(conf.transport_url),
            names=["transport_url in [DEFAULT]"],
        )
        try:
            made = _open(conf, exmods)
        except BaseException:
            hold.drop()
            raise
        # In place of the old one before that is closed, which can take
        # seconds: others send meanwhile.
        self._replace((conf, exmods), made, hold)

    def clean_up(self) -> None:
        self._replace(None, None, None)

    def _replace(
        self,
        settings: tuple[cfg.ConfigOpts, list[str]] | None,
        transport: RPCTransport | None,
        hold: redaction.Hold | None,
    ) -> None:
        pid, old, old_hold = self._pid, self._transport, self._hold
        self._settings, self._hold = settings, hold
        self._transport, self._pid = transport, os.getpid()
        try:
            if old is not None and pid == os.getpid():
                old.cleanup()
        finally:
            if old_hold is not None:
                old_hold.drop()

    def leave_to_parent(self) -> None:
        """In a forked child: never collect what the parent has open."""
        if self._pid != os.getpid():
            keep_for_ever(self._transport)

    @property
    def conf(self) -> cfg.ConfigOpts:
        return cfg.CONF if self._settings is None else self._settings[0]

    def transport(self) -> RPCTransport:
        transport = self._transport
        if transport is not None and self._pid == os.getpid():
            return transport
        if self._settings is None:
            raise exceptions.RPCNotInitialized(
                "no default transport is set up: call cellmw.rpc.init() when "
                "the service starts"
            )
        keep_for_ever(transport)
        conf, exmods = self._settings
        # Two threads may both come here; what the slower one made has opened
        # nothing.
        self._transport = _open(conf, exmods)
        self._pid = os.getpid()
        return self._transport


def _open(conf: cfg.ConfigOpts, exmods: list[str]) -> RPCTransport:
    """Open the default transport; what fails shows no part of its URL."""
    try:
        return oslo.open_default(conf, exmods)
    except ValueError:
        # Its text quotes what urllib stumbled over, a piece of a password.
        problem: BaseException = exceptions.ConfigurationError(
            "cellmw: option transport_url in [DEFAULT] is not a URL that "
            "oslo.messaging can use; percent-encode its password"
        )
    except Exception as error:
        problem = redaction.made_safe(error)
    raise problem


_default = _Default()
# At its end too, for not all servers tell that they fork.
os.register_at_fork(after_in_child=_default.leave_to_parent)
atexit.register(_default.leave_to_parent)


def init(
    conf: cfg.ConfigOpts, allowed_remote_exmods: Iterable[str] = ()
) -> None:
    """Set up the default transport, from ``[DEFAULT] transport_url``.

    Opens no connection; from here on log records are scrubbed, as they are
    where a filter is loaded.  Called once, when the service starts, before or
    after a fork.  A second call replaces the transport and closes the first.

    :param allowed_remote_exmods: modules whose exceptions may come back
    """
    oslo.prepare(conf)
    redaction.install(*options.scrubbed_loggers(conf))
    _default.set_up(conf, list(allowed_remote_exmods))


def cleanup() -> None:
    """Close the default transport.  May block; see oslo.messaging."""
    _default.clean_up()


class _RoutedContext(dict[str, Any]):
    """A serialized context that still knows where its message goes."""

    mq_connection: RPCTransport | None = None


class _Serializer(oslo_messaging.Serializer):
    """Notes the context's transport while the context is serialized."""

    def __init__(self, inner: oslo_messaging.Serializer | None) -> None:
        self._inner = inner

    def serialize_context(self, ctxt: Any) -> _RoutedContext:
        routed = _RoutedContext(self._plain(ctxt))
        for name in _LOCAL_ATTRIBUTES:
            routed.pop(name, None)
        routed.mq_connection = getattr(ctxt, "mq_connection", None)
        return routed

    def _plain(self, ctxt: Any) -> Mapping[str, Any]:
        if self._inner is not None:
            plain: Mapping[str, Any] = self._inner.serialize_context(ctxt)
            return plain
        if isinstance(ctxt, Mapping):
            return ctxt
        to_dict = getattr(ctxt, "to_dict", None)
        if to_dict is None:
            raise TypeError(
                f"a context is a dict or has to_dict(), which "
                f"{type(ctxt).__qualname__} has not; or pass a serializer"
            )
        made: Mapping[str, Any] = to_dict()
        return made

    def deserialize_context(self, ctxt: Any) -> Any:
        inner = self._inner
        return ctxt if inner is None else inner.deserialize_context(ctxt)

    def serialize_entity(self, ctxt: Any, entity: Any) -> Any:
        inner = self._inner
        if inner is None:
            return entity
        return inner.serialize_entity(ctxt, entity)

    def deserialize_entity(self, ctxt: Any, entity: Any) -> Any:
        inner = self._inner
        if inner is None:
            return entity
        return inner.deserialize_entity(ctxt, entity)


class _RouterConf:
    """The configuration of a client whose transport is not known yet.

    A client can be made at import time, before any configuration is read.
    It asks for the reply's timeout before it asks for the transport; None
    leaves that to the transport, which has a configuration of its own.
    """

    rpc_response_timeout = None

    def register_opts(self, *args: Any, **kwargs: Any) -> bool:
        """Done by :func:`init` and by the filter, on theirs."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(_default.conf, name)


class _Router(RPCTransport):
    """Sends each message through the transport of its context.

    :param to_cells: whether contexts count; if not, all goes to the default
    """

    def __init__(self, *, to_cells: bool) -> None:
        self.conf = _RouterConf()
        self._to_cells = to_cells

    @property
    def _driver(self) -> NoReturn:
        raise exceptions.SendOnly

    def _send(
        self,
        target: oslo_messaging.Target,
        ctxt: Any,
        message: dict[str, Any],
        wait_for_reply: bool | None = None,
        timeout: float | None = None,
        call_monitor_timeout: float | None = None,
        retry: int | None = None,
        transport_options: Any = None,
    ) -> Any:
        transport = self._choose(ctxt)
        if wait_for_reply and timeout is None:
            timeout = transport.conf.rpc_response_timeout
        try:
            return transport._send(
                target,
                dict(ctxt),
                message,
                wait_for_reply=wait_for_reply,
                timeout=timeout,
                call_monitor_timeout=call_monitor_timeout,
                # At most once, whatever the caller wants; see the contract of
                # oslo.messaging's retry, which can send twice.
                retry=0,
                transport_options=transport_options,
            )
        except Exception as error:
            # The frames of the driver hold the transport's credentials.
            problem = redaction.made_safe(error)
            if problem is error:
                raise
        raise problem

    def _choose(self, ctxt: Any) -> RPCTransport:
        if self._to_cells:
            transport = getattr(ctxt, "mq_connection", None)
            if transport is not None:
                return transport
        return _default.transport()

    def cleanup(self) -> None:
        """Do nothing: it owns no transport."""


def _make_client(
    to_cells: bool,
    target: oslo_messaging.Target,
    version_cap: str | None,
    serializer: oslo_messaging.Serializer | None,
    call_monitor_timeout: float | None,
) -> oslo_messaging.RPCClient:
    return oslo_messaging.get_rpc_client(
        _Router(to_cells=to_cells),
        target,
        version_cap=version_cap,
        serializer=_Serializer(serializer),
        call_monitor_timeout=call_monitor_timeout,
        retry=0,
    )


def get_client(
    target: oslo_messaging.Target,
    *,
    version_cap: str | None = None,
    serializer: oslo_messaging.Serializer | None = None,
    call_monitor_timeout: float | None = None,
    retry: int | None = None,
) -> oslo_messaging.RPCClient:
    """A client whose messages go to the cell of their context.

    To ``context.mq_connection`` if that is not None, else to the default
    transport.  May be made at import time and kept; thread-safe.  The
    context is serialized by ``serializer``, else by its ``to_dict``, or is a
    dict; ``mq_connection``, ``cell_uuid`` and ``db_connection`` never
    travel.

    :param retry: taken for compatibility and not used: a message is sent at
        most once
    :returns: oslo.messaging's client, with its ``call``, ``cast``,
        ``prepare`` and ``can_send_version``; its sends raise
        :class:`~cellmw.exceptions.SendError` for a cell, and
        :class:`~cellmw.exceptions.RPCNotInitialized` where a default was
        needed that :func:`init` has not set up
    """
    return _make_client(
        True, target, version_cap, serializer, call_monitor_timeout
    )


def get_default_client(
    target: oslo_messaging.Target,
    *,
    version_cap: str | None = None,
    serializer: oslo_messaging.Serializer | None = None,
    call_monitor_timeout: float | None = None,
    retry: int | None = None,
) -> oslo_messaging.RPCClient:
    """A client whose messages all go to the default transport.

    For what runs beside the API: a scheduler, a conductor.  That transport is
    oslo.messaging's own: it has no ``send_timeout``, and raises what the
    driver raises.  The rest as :func:`get_client`.
    """
    return _make_client(
        False, target, version_cap, serializer, call_monitor_timeout
    )


class ClientRouter:
    """Gives code that asks for a client for each context one.

    :param default_client: an oslo.messaging client, of this module or not;
        serves contexts that name no cell
    """

    def __init__(self, default_client: oslo_messaging.RPCClient) -> None:
        self._default_client = default_client

    def client(self, context: Any) -> oslo_messaging.RPCClient:
        """The client for this context.  Blocks for nothing."""
        transport = getattr(context, "mq_connection", None)
        if transport is None:
            return self._default_client
        # A copy and not a new client: making one registers options, which
        # empties the configuration's cache.
        client = copy.copy(self._default_client)
        client.transport = transport
        client.conf = transport.conf
        return client
