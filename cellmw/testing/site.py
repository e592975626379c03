# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A service with two cells in one process, for tests of handlers.

:class:`Site` owns the API database, a broker and a recording host for each
cell and for the default queue, and the filters that it loads.  It notices what
a test rarely asserts: a message in the wrong cell, and a fault that no message
ever met.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import uuid as uuids
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import webob
from oslo_config import cfg

from cellmw import rpc
from cellmw.cells import tables
from cellmw.cells.mapping import CELL0_UUID
from cellmw.deploy import filter_factory
from cellmw.testing import memory_brokers
from cellmw.testing.hosts import Received, RecordingHost
from cellmw.transports import oslo

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

DEFAULT = "default"
CELL0 = "cell0"
CELLS = ("cell1", "cell2")

#: A confirmed identity, as auth_token leaves it in the environ.
IDENTITY = {
    "HTTP_X_IDENTITY_STATUS": "Confirmed",
    "HTTP_X_USER_ID": "test-user",
    "HTTP_X_PROJECT_ID": "test-project",
    "HTTP_X_ROLES": "member",
}

# A test waits that long for what another thread is about to do, in seconds.
_SOON = 5.0

_FAULTS: Mapping[str, Callable[[memory_brokers.Broker], None]] = {
    "refuse": memory_brokers.Broker.refuse,
    "hang": memory_brokers.Broker.hang,
    "lose_confirms": memory_brokers.Broker.lose_confirms,
    "refuse_credentials": lambda broker: broker.require_credentials(
        "nobody", "has-this-password"
    ),
}
_METHODS = {"refuse_credentials": "require_credentials"}


class SiteError(AssertionError):
    """The test left the site in a state that hides a mistake."""


class FaultLeftOn(UserWarning):
    """A fault was still set when the test ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Fault:
    cell: str
    name: str

    def __str__(self) -> str:
        return f"fault {self.name!r} of {self.cell}"


class Site:
    """Two cells, ``cell1`` and ``cell2``, and a service in front of them.

    Made by :func:`open_site` or by the pytest fixture ``cellmw_site``.
    Thread-safe.

    :ivar cells: UUID of each cell by its name, ``cell0`` included
    :ivar conf: the service's configuration, which the filter is loaded with
    :ivar database_url: SQLAlchemy URL of the API database
    """

    def __init__(self, folder: Path) -> None:
        self.database_url = f"sqlite:///{folder / 'api.sqlite'}"
        self.cells = {name: str(uuids.uuid4()) for name in CELLS}
        self.cells[CELL0] = CELL0_UUID
        self.conf = cfg.ConfigOpts()
        self.conf([], project="cellmw-site", default_config_files=[])
        oslo.prepare(self.conf)
        self.conf.set_override("transport_url", _url_of(DEFAULT))
        self._changed = threading.Condition()
        self._received: list[Received] = []
        self._instances: dict[str, str | None] = {}
        self._requests: dict[str, str] = {}
        self._expected: set[tuple[str, str]] = set()
        self._faults: list[_Fault] = []
        self._left_on: list[_Fault] = []
        self._application: WSGIApplication | None = None
        self._engine = sa.create_engine(
            self.database_url, poolclass=sa.NullPool
        )
        self._create_tables()
        self._hosts = {
            name: RecordingHost(self.conf, name, _url_of(name), self._record)
            for name in (*CELLS, DEFAULT)
        }

    # To set up

    def load(
        self, application: WSGIApplication, **options: Any
    ) -> WSGIApplication:
        """Put an application behind the filter; :meth:`request` then uses it.

        Sets up the default transport of :mod:`cellmw.rpc` as well.

        :param options: options of ``[cellmw]``; ``send_timeout`` is 2 seconds
            where the test sets none, so that a test of a fault is quick
        :returns: the filter, a WSGI application
        """
        rpc.init(self.conf)
        values = {"send_timeout": "2"} | {
            name: str(value) for name, value in options.items()
        }
        make = filter_factory(
            {},
            oslo_config_config=self.conf,
            api_database_connection=self.database_url,
            **values,
        )
        self._application = make(application)
        return self._application

    def add_instance(self, cell: str | None) -> str:
        """Add an instance mapping.

        :param cell: name of the cell; None: the instance has no cell yet
        :returns: the instance's UUID
        """
        instance = str(uuids.uuid4())
        self._write(
            tables.instance_mappings.insert().values(
                instance_uuid=instance,
                cell_id=self._id_of(cell),
                project_id=IDENTITY["HTTP_X_PROJECT_ID"],
            )
        )
        self._instances[instance] = cell
        return instance

    def move_instance(self, instance: str, cell: str | None) -> None:
        """Change the cell of an instance's mapping."""
        table = tables.instance_mappings
        self._write(
            table.update()
            .where(table.c.instance_uuid == instance)
            .values(cell_id=self._id_of(cell))
        )
        self._instances[instance] = cell

    def answer(self, method: str, answer: Any, *, cell: str = "") -> None:
        """Set what the hosts answer to an RPC call; None where nothing is.

        :param answer: see :meth:`RecordingHost.answer`
        :param cell: name of one cell; empty: all of them
        """
        names = [self._known(cell)] if cell else list(self._hosts)
        for name in names:
            self._hosts[name].answer(method, answer)

    def expect_elsewhere(self, cell: str, method: str) -> None:
        """Let this method reach a cell that the instance is not in.

        For a handler that sends to a second cell on purpose, such as one that
        moves an instance.
        """
        self._expected.add((self._known(cell), method))

    # To use

    def request(
        self,
        path: str,
        method: str = "GET",
        *,
        environ: Mapping[str, Any] | None = None,
        **request: Any,
    ) -> webob.Response:
        """Send one request through the filter, and read the whole response.

        :param environ: added to the environ, over a confirmed identity
        :param request: what :meth:`webob.Request.blank` takes, such as
            ``json`` or ``headers``
        """
        if self._application is None:
            raise SiteError("no application is loaded: call load() first")
        request_id = f"req-{uuids.uuid4()}"
        values: dict[str, Any] = {
            **IDENTITY,
            "openstack.request_id": request_id,
            **(environ or {}),
        }
        made = webob.Request.blank(
            path, method=method, environ=values, **request
        )
        for instance in self._instances:
            if instance in path.lower():
                self._requests[request_id] = instance
        response = made.get_response(self._application)
        # Reads the body to its end, and closes it.
        assert isinstance(response.body, bytes)
        return response

    def fault(
        self, cell: str, name: str
    ) -> contextlib.AbstractContextManager[None]:
        """Break a cell's broker, until :meth:`heal` or the end of a ``with``.

        :param name: ``refuse`` connections; ``hang``: take messages and
            answer nothing; ``lose_confirms``: deliver, and fail the sender;
            ``refuse_credentials``
        :raises LookupError: no cell or no fault has this name
        """
        broker = self._broker(cell)
        if name not in _FAULTS:
            raise LookupError(
                f"no fault is called {name!r}; there are {', '.join(_FAULTS)}"
            )
        fault = _Fault(cell, name)
        self._faults.append(fault)
        self._left_on.append(fault)
        _FAULTS[name](broker)
        return self._healed(cell)

    @contextlib.contextmanager
    def _healed(self, cell: str) -> Iterator[None]:
        try:
            yield
        finally:
            self.heal(cell)

    def heal(self, cell: str) -> None:
        """End all faults of a cell."""
        self._broker(cell).heal()
        self._left_on = [one for one in self._left_on if one.cell != cell]

    # To look at

    def received(self, cell: str | None = None) -> list[Received]:
        """What the hosts received so far, in the order of arrival.

        :param cell: name of one cell, or ``default``; None: all
        """
        if cell is not None:
            self._known(cell)
        with self._changed:
            return [one for one in self._received if cell in (None, one.cell)]

    def assert_received(self, cell: str, method: str, **args: Any) -> Received:
        """Wait until a cell's host has received such a message.

        :param args: arguments that the message has, among others
        :raises SiteError: it did not arrive; says what did
        """
        self._known(cell)

        def find() -> Received | None:
            for one in self._received:
                if (one.cell, one.method) == (cell, method) and all(
                    one.args.get(key) == value for key, value in args.items()
                ):
                    return one
            return None

        with self._changed:
            found = self._changed.wait_for(find, _SOON)
            if found is not None:
                return found
            arrived = ", ".join(map(_describe, self._received)) or "nothing"
        raise SiteError(
            f"{cell} received no {method}({args}); received: {arrived}"
        )

    def assert_nothing_received(self, cell: str | None = None) -> None:
        """Fail if a host received a message.

        :param cell: name of one cell, or ``default``; None: any
        """
        found = self.received(cell)
        if found:
            raise SiteError(f"received: {', '.join(map(_describe, found))}")

    # To end

    def close(self) -> None:
        """Stop the hosts, heal the brokers and close the default transport."""
        for name in self._hosts:
            memory_brokers.broker_of(_url_of(name)).heal()
        rpc.cleanup()
        for host in self._hosts.values():
            host.stop()
        self._engine.dispose()

    def check(self) -> None:
        """Fail with :class:`SiteError` for what the test has overlooked.

        Warns with :class:`FaultLeftOn` of faults that nobody has ended.
        """
        for fault in self._left_on:
            warnings.warn(
                f"{fault} was still set when the test ended; end it with "
                f"site.heal({fault.cell!r}), or use site.fault() in a with "
                "statement",
                FaultLeftOn,
                stacklevel=2,
            )
        problems = [
            f"{fault} was never met by any message"
            for fault in self._faults
            if not self._is_met(fault)
        ]
        problems += [
            f"{_describe(one)}: instance {instance} is in "
            f"{where or 'no cell'}; if the handler means it, call "
            f"site.expect_elsewhere({one.cell!r}, {one.method!r})"
            for one, instance, where in self._astray()
        ]
        if problems:
            raise SiteError("; ".join(problems))

    def _is_met(self, fault: _Fault) -> bool:
        met = self._broker(fault.cell).faults_met()
        return _METHODS.get(fault.name, fault.name) in met

    def _astray(self) -> Iterator[tuple[Received, str, str | None]]:
        """Messages that reached another cell than that of their instance."""
        for one in self.received():
            if (one.cell, one.method) in self._expected:
                continue
            for instance in self._named_by(one):
                where = self._instances[instance]
                # Without a cell it is the default queue's.
                if one.cell != (where or DEFAULT):
                    yield one, instance, where
                    break

    def _named_by(self, one: Received) -> Iterator[str]:
        """The instances that a message is about."""
        for value in one.args.values():
            if isinstance(value, str) and value in self._instances:
                yield value
        # A handler may ask a scheduler on the default queue.
        of_request = self._requests.get(str(one.context.get("request_id")))
        if of_request is not None and one.cell != DEFAULT:
            yield of_request

    def _record(self, received: Received) -> None:
        with self._changed:
            self._received.append(received)
            self._changed.notify_all()

    def _known(self, cell: str) -> str:
        if cell not in self._hosts:
            raise LookupError(
                f"no cell is called {cell!r}; there are "
                f"{', '.join(self._hosts)}"
            )
        return cell

    def _broker(self, cell: str) -> memory_brokers.Broker:
        return memory_brokers.broker_of(_url_of(self._known(cell)))

    def _id_of(self, cell: str | None) -> int | None:
        if cell is None:
            return None
        if cell not in self.cells:
            raise LookupError(
                f"no cell is called {cell!r}; there are "
                f"{', '.join(self.cells)}"
            )
        return list(self.cells).index(cell) + 1

    def _create_tables(self) -> None:
        tables.metadata.create_all(self._engine)
        rows = [
            {
                "id": self._id_of(name),
                "uuid": uuid,
                "name": name,
                "transport_url": (
                    "none:///" if name == CELL0 else _url_of(name)
                ),
                "database_connection": "sqlite://",
            }
            for name, uuid in self.cells.items()
        ]
        self._write(tables.cell_mappings.insert().values(rows))

    def _write(self, statement: sa.Executable) -> None:
        with self._engine.begin() as connection:
            connection.execute(statement)


def _url_of(cell: str) -> str:
    return f"cellmw-memory://user:a-password@site/{cell}"


def _describe(received: Received) -> str:
    return f"{received.method} ({received.cell})"


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """A :class:`Site` for one test, closed and checked at its end.

    :param folder: for the SQLite file
    :raises SiteError: see :meth:`Site.check`
    """
    site = Site(folder)
    try:
        yield site
    except BaseException:
        site.close()
        raise
    try:
        site.check()
    finally:
        site.close()
