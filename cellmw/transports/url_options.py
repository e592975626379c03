# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Checks of the driver options that a transport URL sets in its query.

oslo.messaging converts these options when it makes a transport.  It leaves
other mistakes to the first connection or the first message: a TLS version
that does not exist, a missing certificate file, a number that does not fit
into the protocol.  This module finds them without a broker.

A reason names the option and what it accepts.  It quotes no value and no
unknown name, because either may be a piece of a password.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kombu.compression
import oslo_messaging
import oslo_messaging.opts
from oslo_config import cfg
from oslo_messaging._drivers import common, impl_rabbit

from cellmw import options

RABBIT = "oslo_messaging_rabbit"

# Least and most, where the option's own type allows values that its driver,
# the protocol or RabbitMQ does not.
_LIMITS: Mapping[str, tuple[int | None, int]] = {
    "conn_pool_ttl": (0, 2**31 - 1),
    # Below 1 a connection waits without end, or fails to open.
    "heartbeat_rate": (1, 65535),
    # AMQP 0-9-1 gives the heartbeat and the prefetch count 16 bits each.
    "heartbeat_timeout_threshold": (0, 65535),
    "rabbit_qos_prefetch_count": (None, 65535),
    # RabbitMQ takes a queue's time to live as 32 bits of milliseconds.
    "rabbit_transient_queues_ttl": (0, (2**32 - 1) // 1000),
}
# What the client library can speak, of the values that the option allows.
_LOGIN_METHODS = ("AMQPLAIN", "PLAIN", "EXTERNAL")
_TLS_FILES = ("ssl_ca_file", "ssl_cert_file", "ssl_key_file")
# Both become parts of a file name and of a queue name.
_QUEUE_NAME_PARTS = ("hostname", "processname")
_LONGEST_PART = 100


def refusal(conf: cfg.ConfigOpts, url: oslo_messaging.TransportURL) -> str:
    """Why a driver does not take its options; empty if none is at fault.

    :param conf: the configuration on which the driver has registered them
    """
    group = _group_of(url.transport)
    known = _options_of(group)
    if not known:
        return ""  # a driver that does not publish its options
    for name in url.query:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; the nearest known one is {near[0]}" if near else ""
            return f"its query names an unknown option{hint}"
    for name, opt in known.items():
        try:
            if name in url.query:
                opt.type(url.query[name])
            else:
                conf[group][name]
        except (cfg.Error, ValueError, TypeError, OverflowError):
            return _bad(_where(name, url.query), options.accepted(opt.type))
    if group != RABBIT:
        return ""
    merged = common.ConfigOptsProxy(conf, url, group)
    return rabbit_problem(merged[group], url.query)


def missing_package(scheme: str) -> str:
    """Which package a driver needs that is not installed, if that is it."""
    found = importlib.metadata.entry_points(
        group="oslo.messaging.drivers", name=scheme.partition("+")[0]
    )
    for entry in found:
        try:
            entry.load()
        except ImportError as error:
            extra = _extra(entry)
            how = f" (pip install '{extra}')" if extra else ""
            return (
                "its driver needs the Python package "
                f"{error.name}, which is not installed{how}"
            )
    return ""


def rabbit_problem(values: Any, query: Mapping[str, Any]) -> str:
    """What would stop RabbitMQ's driver from connecting; empty if nothing.

    Reads the certificate files, so it may block as the file system does.

    :param values: the driver's options, those of the query included
    :param query: the options that stand in the URL
    """
    problems = (
        *(_limit_problem(name, values, query) for name in _LIMITS),
        _pool_problem(values, query),
        _stream_problem(values, query),
        _login_problem(values, query),
        _compression_problem(values, query),
        _queue_manager_problem(values, query),
    )
    found = next(filter(None, problems), "")
    if not found and values.ssl:
        return next(_tls_problems(values, query), "")
    return found


def _group_of(transport: str) -> str:
    driver = transport.partition("+")[0]
    return RABBIT if driver == "kombu" else f"oslo_messaging_{driver}"


@functools.cache
def _options_of(group: str) -> Mapping[str, cfg.Opt]:
    return {
        opt.dest: opt
        for name, opts in oslo_messaging.opts.list_opts()
        if name == group
        for opt in opts
    }


def _extra(entry: importlib.metadata.EntryPoint) -> str:
    if entry.dist is None:
        return ""
    extras = entry.dist.metadata.get_all("Provides-Extra") or ()
    return f"{entry.dist.name}[{entry.name}]" if entry.name in extras else ""


def _where(name: str, query: Mapping[str, Any]) -> str:
    place = "its query" if name in query else f"[{RABBIT}]"
    return f"option {name} in {place}"


def _bad(where: str, accepted: str) -> str:
    return f"{where} has a bad value; accepted: {accepted}"


def _limit_problem(name: str, values: Any, query: Mapping[str, Any]) -> str:
    value = getattr(values, name)
    least, most = _LIMITS[name]
    if value is None or (value <= most and (least is None or value >= least)):
        return ""
    low = "at most" if least is None else f"{least} to"
    return _bad(_where(name, query), f"a whole number, {low} {most}")


def _pool_problem(values: Any, query: Mapping[str, Any]) -> str:
    if values.conn_pool_min_size <= values.rpc_conn_pool_size:
        return ""
    name = (
        "rpc_conn_pool_size"
        if "rpc_conn_pool_size" in query
        else "conn_pool_min_size"
    )
    return (
        f"{_where(name, query)} has a bad value: conn_pool_min_size must not "
        "be greater than rpc_conn_pool_size"
    )


def _stream_problem(values: Any, query: Mapping[str, Any]) -> str:
    if not values.rabbit_stream_fanout:
        return ""
    where = _where("rabbit_stream_fanout", query)
    if values.rabbit_qos_prefetch_count <= 0:
        return f"{where} requires rabbit_qos_prefetch_count to be above 0"
    if not values.rabbit_transient_quorum_queue:
        return f"{where} requires rabbit_transient_quorum_queue to be true"
    return ""


def _login_problem(values: Any, query: Mapping[str, Any]) -> str:
    if values.rabbit_login_method in _LOGIN_METHODS:
        return ""
    accepted = " or ".join(_LOGIN_METHODS)
    return _bad(_where("rabbit_login_method", query), accepted)


def _compression_problem(values: Any, query: Mapping[str, Any]) -> str:
    known = sorted(
        name for name in kombu.compression.encoders() if "/" not in name
    )
    if not values.kombu_compression or values.kombu_compression in known:
        return ""
    return _bad(_where("kombu_compression", query), " or ".join(known))


def _queue_manager_problem(values: Any, query: Mapping[str, Any]) -> str:
    if not values.use_queue_manager:
        return ""
    for name in _QUEUE_NAME_PARTS:
        text = getattr(values, name)
        if "/" in text or "\0" in text or len(text) > _LONGEST_PART:
            return _bad(
                _where(name, query),
                f"at most {_LONGEST_PART} characters without a slash",
            )
    return ""


def _tls_problems(values: Any, query: Mapping[str, Any]) -> Iterator[str]:
    version = values.ssl_version
    known = impl_rabbit.Connection._SSL_PROTOCOLS
    if version and version.lower() not in known:
        yield _bad(_where("ssl_version", query), " or ".join(sorted(known)))
    for name in _TLS_FILES:
        problem = _file_problem(getattr(values, name))
        if problem:
            yield f"{_where(name, query)} names {problem}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if values.ssl_cert_file:
        where = _where("ssl_cert_file", query)
        try:
            context.load_cert_chain(
                values.ssl_cert_file, values.ssl_key_file or None, _encrypted
            )
        except _Encrypted:
            # The driver would wait for somebody to type it in.
            yield f"{where} comes with an encrypted key, which is not possible"
        except (OSError, ValueError):
            yield (
                f"{where} holds no certificate in PEM form that belongs to "
                "the key in ssl_key_file"
            )
    if values.ssl_ca_file:
        try:
            context.load_verify_locations(values.ssl_ca_file)
        except (OSError, ValueError):
            yield (
                f"{_where('ssl_ca_file', query)} holds no certificate in PEM "
                "form"
            )


class _Encrypted(Exception):
    """A key cannot be read without a pass phrase."""


def _encrypted() -> str:
    raise _Encrypted


def _file_problem(name: str) -> str:
    if not name:
        return ""
    path = Path(name)
    try:
        # Opening anything else, a pipe for example, may block.
        if not path.is_file():
            return "a file that does not exist"
        with path.open("rb"):
            return ""
    except OSError:
        return "a file that this process may not read"
