# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What ``mq_connection`` is, and how long: section 4 of the contract.

The ends of responses are in ``test_contract_responses.py``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_messaging.transport import RPCTransport

import cellmw
from cellmw import exceptions, rpc, runtime, testing
from cellmw.cells.mapping import CELL0_UUID
from tests.functional import stack
from tests.functional.stack import Api, ApiDatabase, MakeFilter, Serve

ONE = "cellmw-memory://one/cell"
TWO = "cellmw-memory://two/cell"
client = rpc.get_client(stack.target(server="host"))


class Cells:
    """Two cells with a host and an instance each, and a filter for them."""

    def __init__(
        self,
        api_database: ApiDatabase,
        serve: Serve,
        make_filter: MakeFilter,
        registry: runtime.Registry,
    ) -> None:
        self.database = api_database
        self.hosts = [serve(ONE), serve(TWO)]
        self.uuids = [
            api_database.add_cell(ONE, name="one"),
            api_database.add_cell(TWO, name="two"),
        ]
        self.instances = api_database.add_instances(self.uuids)
        self._make_filter = make_filter
        self._registry = registry

    def application(self, handler: stack.Handler = repr, **paste: Any) -> Any:
        return self._make_filter(**paste)(Api(handler))

    def request(
        self,
        handler: stack.Handler,
        *,
        cell: int = 0,
        method: str = "POST",
        context: Any = None,
        **paste: Any,
    ) -> Any:
        """Do something in a request for the instance of a cell."""
        found: list[Any] = []
        environ = {} if context is None else {"cellmw.context": context}
        response = stack.request(
            self.application(lambda c: found.append(handler(c)), **paste),
            f"/servers/{self.instances[cell]}",
            method,
            environ=environ,
        )
        assert response.status_int == 200, response
        return found[0]

    def ended(self, **paste: Any) -> Any:
        """The context of a request that has sent a message, and is over."""

        def handler(context: Any) -> Any:
            console_output(context)
            return context

        return self.request(handler, **paste)

    @property
    def pool(self) -> Any:
        """What the only filter's pool tells of itself."""
        (shared,) = self._registry
        return shared.process().pool.stats()

    def messages(self) -> list[int]:
        return [len(host.messages) for host in self.hosts]


@pytest.fixture
def cells(
    api_database: ApiDatabase,
    serve: Serve,
    make_filter: MakeFilter,
    runtimes: runtime.Registry,
) -> Cells:
    return Cells(api_database, serve, make_filter, runtimes)


def console_output(context: Any) -> Any:
    """Call; the answer tells which host it was."""
    return client.call(context, "get_console_output", instance_uuid="x")


def refused(context: Any) -> exceptions.SendError:
    with pytest.raises(exceptions.SendError) as caught:
        console_output(context)
    with pytest.raises(type(caught.value)):
        client.cast(context, "reboot_instance", instance_uuid="x")
    return caught.value


# What it is


def test_it_is_a_transport_of_oslo_messaging(cells: Cells) -> None:
    assert cells.request(
        lambda context: isinstance(context.mq_connection, RPCTransport)
    )


def everything_but_sending(context: Any) -> None:
    """All that is done with a handle on the way, and opens nothing."""
    handle = context.mq_connection
    assert bool(handle) is True
    assert "://" not in repr(handle)
    assert copy.copy(handle) is handle
    assert copy.deepcopy(handle) is handle
    assert copy.deepcopy({"a": [handle]})["a"][0] is handle
    assert handle == handle
    assert handle != object()
    assert {handle: 1}[handle] == 1
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(handle, protocol)
    handle.cleanup()
    handle.cleanup()
    made = oslo_messaging.get_rpc_client(handle, stack.target())
    made.prepare(server="host", timeout=1)
    oslo_messaging.get_rpc_server(handle, stack.target(server="s"), [])
    assert isinstance(handle.conf, cfg.ConfigOpts)


def test_what_sends_nothing_opens_nothing(cells: Cells) -> None:
    # The database's and the filter's threads come with the first request.
    cells.request(everything_but_sending)
    before = set(threading.enumerate())
    opened = [testing.broker_of(url).stats() for url in (ONE, TWO)]
    for cell in (0, 1):
        cells.request(everything_but_sending, cell=cell, method="GET")
        cells.request(everything_but_sending, cell=cell)
    assert [testing.broker_of(url).stats() for url in (ONE, TWO)] == opened
    assert cells.pool.total.opened == 0
    assert not {
        thread.name
        for thread in set(threading.enumerate()) - before
        if "worker" not in thread.name
    }


def test_two_requests_have_handles_of_their_own(cells: Cells) -> None:
    one, two = (
        cells.request(lambda context: context.mq_connection) for _ in "12"
    )
    assert one is not two
    assert one != two


def test_after_cleanup_it_still_sends(cells: Cells) -> None:
    def handler(context: Any) -> Any:
        context.mq_connection.cleanup()
        first = console_output(context)
        context.mq_connection.cleanup()
        return first, console_output(context)

    assert cells.request(handler) == ([ONE, "x"], [ONE, "x"])


def listen(context: Any) -> None:
    server = oslo_messaging.get_rpc_server(
        context.mq_connection, stack.target(server="s"), [stack.Host("s")]
    )
    server.start()


def notify(context: Any) -> None:
    # What a Notifier's driver calls; it logs what that raises.
    context.mq_connection._send_notification(
        stack.target(), {}, {"event_type": "event"}, version=2.0
    )


def listen_for_notifications(context: Any) -> None:
    listener = oslo_messaging.get_notification_listener(
        context.mq_connection, [stack.target()], [object()]
    )
    listener.start()


@pytest.mark.parametrize("use", [listen, notify, listen_for_notifications])
def test_it_neither_listens_nor_notifies(
    cells: Cells,
    use: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handler(context: Any) -> None:
        with pytest.raises(exceptions.SendError) as caught:
            use(context)
        assert type(caught.value) is exceptions.SendOnly
        # It still sends.
        assert console_output(context) == [ONE, "x"]

    cells.request(handler)
    assert "reason send_only: cell" in caplog.text


# Contexts with it


def test_our_context_is_pickled_without_it_and_copied_with_it(
    cells: Cells,
) -> None:
    def handler(context: Any) -> None:
        handle = context.mq_connection
        for made in (
            copy.copy(context),
            copy.deepcopy(context),
            context.from_dict(context.to_dict()),
        ):
            assert type(made) is cellmw.RequestContext
            assert made is not context
            assert made.request_id == context.request_id
        assert copy.copy(context).mq_connection is handle
        assert copy.deepcopy(context).mq_connection is handle
        assert context.mq_connection is handle
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            made = pickle.loads(pickle.dumps(context, protocol))
            assert made.mq_connection is None
            assert made.request_id == context.request_id
        assert not {"mq_connection", "cell_uuid"} & context.to_dict().keys()
        # The copy is as good as the first.
        assert console_output(copy.copy(context)) == [ONE, "x"]

    cells.request(handler)


def test_what_the_handler_has_put_in_its_place_is_left_alone(
    cells: Cells,
) -> None:
    mine = object()

    def handler(context: Any) -> Any:
        console_output(context)
        context.mq_connection = mine
        context.cell_uuid = "mine"
        return context

    context = cells.request(handler)
    assert context.mq_connection is mine
    assert context.cell_uuid == "mine"
    assert cells.pool.leases == 0


# After the end


def test_after_the_end_it_stays_and_refuses(cells: Cells) -> None:
    context = cells.ended()
    assert isinstance(context.mq_connection, RPCTransport)
    assert context.cell_uuid == cells.uuids[0]
    before = cells.messages()
    error = refused(context)
    assert type(error) is exceptions.TransportReleased
    assert error.cell_uuid == cells.uuids[0]
    assert not error.maybe_delivered
    everything = (bool, repr, copy.copy, copy.deepcopy, hash)
    assert all(use(context.mq_connection) for use in everything)
    context.mq_connection.cleanup()
    assert cells.messages() == before


def test_a_request_that_sent_nothing_refuses_after_its_end_too(
    cells: Cells,
) -> None:
    context = cells.request(lambda context: context)
    assert type(refused(context)) is exceptions.TransportReleased


@pytest.mark.parametrize("url", [ONE, "none:///", "not a URL"])
def test_it_is_never_pickled_not_even_when_it_is_over(
    url: str, api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    instance = api_database.add_instance(api_database.add_cell(url))
    api = Api()
    stack.request(make_filter()(api), f"/servers/{instance}")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(api.contexts[0].mq_connection, protocol)


def reached_from(start: object) -> Iterator[object]:
    """All objects that an object keeps alive, by any number of steps.

    Without those that everybody reaches: classes, functions and modules.
    """
    everybodys = (type, types.FunctionType, types.ModuleType)
    seen = {id(start)}
    waiting = [start]
    while waiting:
        for found in gc.get_referents(waiting.pop()):
            if id(found) not in seen and not isinstance(found, everybodys):
                seen.add(id(found))
                waiting.append(found)
                yield found


@pytest.mark.parametrize("cached", ["true", "false"])
def test_after_the_end_it_holds_nothing(cells: Cells, cached: str) -> None:
    def holds(context: Any) -> set[str]:
        handle = context.mq_connection
        ours = ("cellmw.runtime", "cellmw.transports", "oslo_messaging")
        return {
            type(found).__name__
            for found in reached_from(handle)
            if isinstance(found, (RPCTransport, cfg.ConfigOpts))
            or type(found).__module__.startswith(ours)
        }

    live = cells.request(
        lambda context: (console_output(context), holds(context)),
        transport_cache=cached,
    )
    assert {"Pool", "ConfigOpts"} <= live[1], "the walk finds nothing"
    assert holds(cells.ended(transport_cache=cached)) == set()


# A message in flight


@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_message_in_flight_keeps_the_lease_until_it_is_done(
    cached: str,
    api_database: ApiDatabase,
    serve: Serve,
    make_filter: MakeFilter,
    runtimes: runtime.Registry,
) -> None:
    host = stack.SlowHost("slow")
    serve(ONE, host)
    instance = api_database.add_instance(api_database.add_cell(ONE))
    answers: list[Any] = []

    def call(context: Any) -> None:
        answers.append(console_output(context))

    def handler(context: Any) -> None:
        thread = threading.Thread(target=call, args=(context,))
        thread.start()
        threads.append(thread)
        assert host.busy.wait(stack.SOON)

    threads: list[threading.Thread] = []
    api = Api(handler)
    stack.request(
        make_filter(transport_cache=cached)(api), f"/servers/{instance}"
    )
    (shared,) = runtimes
    pool = shared.process().pool
    # The response is over: nothing new goes out, what is out is kept.
    assert type(refused(api.contexts[0])) is exceptions.TransportReleased
    assert answers == []
    assert pool.stats().leases == 1
    assert pool.stats().total.closed == 0
    host.go_on.set()
    threads[0].join(stack.SOON)
    assert answers == [["slow", "x"]]
    stack.eventually(lambda: pool.stats().leases == 0)
    if cached == "false":
        stack.eventually(lambda: pool.stats().total.closed == 1)


def test_closing_holds_up_nobody(cells: Cells) -> None:
    broker = testing.broker_of(ONE)
    broker.hold_closing()
    for _ in range(3):
        context = cells.ended(transport_cache="false")
        assert type(refused(context)) is exceptions.TransportReleased
    # Three are being closed, and it takes its time.
    assert cells.pool.total.opened == 3
    assert cells.pool.total.closed == 0
    assert cells.pool.leases == 0
    broker.heal()
    stack.eventually(lambda: cells.pool.total.closed == 3)


# One cell, one generation


def test_a_request_keeps_its_cell_when_the_instance_moves(
    cells: Cells,
) -> None:
    def handler(context: Any) -> Any:
        first = console_output(context)
        cells.database.move_instance(cells.instances[0], cells.uuids[1])
        return first, console_output(context), context.cell_uuid

    answers = cells.request(handler)
    assert answers == ([ONE, "x"], [ONE, "x"], cells.uuids[0])
    assert cells.request(console_output) == [TWO, "x"]


def test_a_request_that_has_sent_nothing_yet_keeps_its_cell_too(
    cells: Cells,
) -> None:
    def handler(context: Any) -> Any:
        cells.database.move_instance(cells.instances[0], cells.uuids[1])
        return console_output(context)

    assert cells.request(handler) == [ONE, "x"]


@pytest.mark.parametrize("cached", ["true", "false"])
def test_from_its_first_message_a_request_keeps_one_generation(
    cells: Cells, cached: str
) -> None:
    options: dict[str, Any] = {
        "transport_cache": cached,
        "cell_refresh_interval": "0",
    }

    def handler(context: Any) -> Any:
        first = console_output(context)
        cells.database.change_cell(cells.uuids[0], transport_url=TWO)
        # Another request sees the new one already.
        other = cells.request(console_output, **options)
        return first, other, console_output(context), context.cell_uuid

    answers = cells.request(handler, **options)
    assert answers == ([ONE, "x"], [TWO, "x"], [ONE, "x"], cells.uuids[0])
    assert cells.request(console_output, **options) == [TWO, "x"]


def test_a_request_keeps_its_generation_when_its_connections_die(
    cells: Cells,
) -> None:
    options: dict[str, Any] = {
        "cell_refresh_interval": "0",
        "breaker_failures": "0",
    }
    broker = testing.broker_of(ONE)

    def handler(context: Any) -> Any:
        first = console_output(context)
        broker.refuse()
        with pytest.raises(exceptions.CellUnavailable):
            client.cast(context, "reboot_instance")
        cells.database.change_cell(cells.uuids[0], transport_url=TWO)
        broker.heal()
        return first, console_output(context)

    # On a new transport, with the old connection information.
    assert cells.request(handler, **options) == ([ONE, "x"], [ONE, "x"])
    assert cells.request(console_output, **options) == [TWO, "x"]


# Work that outlives a request, or goes to another cell


class NovasCellMapping:
    """As much of Nova's object as its users look at."""

    def __init__(self, uuid: str) -> None:
        self.id = 7
        self.uuid = uuid
        self.name = "a-name"
        self.transport_url = "rabbit://not/looked/at"
        self.database_connection = "mysql+pymysql://unused"
        self.disabled = False

    @property
    def identity(self) -> str:
        return f"{self.uuid}({self.name})"


KINDS: dict[str, Callable[[str], Any]] = {
    "ours": lambda uuid: cellmw.CellMapping(uuid=uuid, name="a-name"),
    "Nova's": NovasCellMapping,
    "a UUID": str,
    "an upper-case UUID": str.upper,
}


@pytest.mark.parametrize("kind", KINDS)
def test_target_cell_goes_to_another_cell(cells: Cells, kind: str) -> None:
    def handler(context: Any) -> Any:
        handle = context.mq_connection
        cell = KINDS[kind](cells.uuids[1])
        with cellmw.target_cell(context, cell) as cell_context:
            assert cell_context is not context
            assert type(cell_context) is type(context)
            assert cell_context.request_id == context.request_id
            assert cell_context.cell_uuid == cells.uuids[1]
            assert cell_context.mq_connection is not handle
            answers = console_output(cell_context), console_output(context)
        # The request's own is untouched, the copy's is over.
        assert context.mq_connection is handle
        assert context.cell_uuid == cells.uuids[0]
        assert console_output(context) == [ONE, "x"]
        assert type(refused(cell_context)) is exceptions.TransportReleased
        return answers

    assert cells.request(handler) == ([TWO, "x"], [ONE, "x"])
    assert cells.pool.leases == 0


def test_target_cell_outlives_the_request(cells: Cells) -> None:
    context = cells.ended()
    assert type(refused(context)) is exceptions.TransportReleased
    with cellmw.target_cell(context, cells.uuids[0]) as cell_context:
        assert console_output(cell_context) == [ONE, "x"]
        assert cells.pool.leases == 1
    assert cells.pool.leases == 0
    assert type(refused(cell_context)) is exceptions.TransportReleased


def test_a_lease_of_target_cell_is_its_own(cells: Cells) -> None:
    with contextlib.ExitStack() as block:

        def handler(context: Any) -> Any:
            made = block.enter_context(
                cellmw.target_cell(context, cells.uuids[0])
            )
            console_output(context)
            return made

        cell_context = cells.request(handler, transport_cache="false")
        # The request is over, the block is not.
        assert console_output(cell_context) == [ONE, "x"]
        assert cells.pool.leases == 1
    assert cells.pool.leases == 0


def test_a_block_of_target_cell_that_raises_ends_its_lease(
    cells: Cells,
) -> None:
    context = cells.ended()
    with pytest.raises(KeyboardInterrupt):
        with cellmw.target_cell(context, cells.uuids[1]) as cell_context:
            console_output(cell_context)
            raise KeyboardInterrupt
    assert cells.pool.leases == 0


def test_target_cell_that_sends_nothing_opens_nothing(cells: Cells) -> None:
    context = cells.request(lambda context: context)
    with cellmw.target_cell(context, cells.uuids[1]):
        pass
    assert cells.pool.total.opened == 0


def test_blocks_of_target_cell_may_be_nested(cells: Cells) -> None:
    context = cells.ended()
    one, two = cells.uuids
    with cellmw.target_cell(context, one) as first:
        with cellmw.target_cell(first, two) as second:
            assert console_output(second) == [TWO, "x"]
        assert console_output(first) == [ONE, "x"]


class Foreign:
    def __init__(self) -> None:
        self.user = "u"

    def to_dict(self) -> dict[str, Any]:
        return {"user": self.user}


def test_target_cell_takes_any_context(cells: Cells) -> None:
    cells.application()
    context = Foreign()
    with cellmw.target_cell(context, cells.uuids[1]) as cell_context:
        assert type(cell_context) is Foreign
        assert console_output(cell_context) == [TWO, "x"]
    assert vars(context) == {"user": "u"}


def test_target_cell_knows_cell0_and_cells_that_are_not_there(
    cells: Cells,
) -> None:
    cells.database.add_cell0()
    context = cells.ended()
    with cellmw.target_cell(context, CELL0_UUID) as cell_context:
        assert type(refused(cell_context)) is exceptions.CellHasNoQueue
    with pytest.raises(exceptions.CellNotFound) as caught:
        with cellmw.target_cell(context, "no-such-cell"):
            pytest.fail("entered")
    assert caught.value.cell_uuid == "no-such-cell"


def test_target_cell_finds_a_cell_that_was_made_just_now(
    cells: Cells,
) -> None:
    context = cells.ended()
    new = cells.database.add_cell(TWO)
    with cellmw.target_cell(context, new) as cell_context:
        assert console_output(cell_context) == [TWO, "x"]


def test_target_cell_without_a_filter_raises(
    runtimes: runtime.Registry,
) -> None:
    with pytest.raises(LookupError, match="no cellmw filter"):
        with cellmw.target_cell(Foreign(), "a-cell"):
            pytest.fail("entered")


class Sites:
    """Two filters with databases of their own, that know one UUID apiece.

    The UUID is the same in both, the queues are not.
    """

    def __init__(
        self, first: Cells, make_filter: MakeFilter, url: str
    ) -> None:
        other = ApiDatabase(url)
        self.uuid = first.uuids[0]
        other.add_cell(TWO, uuid=self.uuid)
        self.instance = first.instances[0]
        other.add_instance(self.uuid)
        other.close()
        self.factories = [make_filter(), make_filter(database=url)]

    def context(self, number: int, path: str, context: Any = None) -> Any:
        """A context that came through one of the two filters."""
        api = Api()
        environ = {} if context is None else {"cellmw.context": context}
        response = stack.request(
            self.factories[number](api), path, environ=environ
        )
        assert response.status_int == 200
        return api.contexts[0]


@pytest.fixture
def sites(cells: Cells, make_filter: MakeFilter, tmp_path: Any) -> Sites:
    return Sites(cells, make_filter, f"sqlite:///{tmp_path}/other.db")


@pytest.mark.parametrize("made_here", [True, False])
@pytest.mark.parametrize("with_instance", [True, False])
def test_target_cell_takes_the_runtime_that_the_context_came_through(
    sites: Sites, with_instance: bool, made_here: bool
) -> None:
    for number, url in ((0, ONE), (1, TWO), (0, ONE)):
        # The second filter knows nothing of the instance.
        path = "/servers"
        if with_instance and number == 0:
            path += f"/{sites.instance}"
        given = None if made_here else Foreign()
        context = sites.context(number, path, given)
        with cellmw.target_cell(context, sites.uuid) as cell_context:
            assert console_output(cell_context) == [url, "x"]
            # And so do copies of the copy.
            with cellmw.target_cell(copy.copy(cell_context), sites.uuid) as it:
                assert console_output(it) == [url, "x"]


def test_target_cell_with_several_runtimes_wants_to_know_which(
    sites: Sites,
) -> None:
    with pytest.raises(LookupError, match="several"):
        with cellmw.target_cell(Foreign(), sites.uuid):
            pytest.fail("entered")


def test_who_moves_an_instance_can_say_so(cells: Cells) -> None:
    uuid = cells.instances[0]

    def move(context: Any) -> None:
        cells.database.move_instance(uuid, cells.uuids[1])
        cellmw.forget_instance(context, uuid.upper())

    assert cells.request(console_output, method="GET") == [ONE, "x"]
    cells.request(move, method="GET")
    assert cells.request(console_output, method="GET") == [TWO, "x"]


def test_who_changes_a_cell_can_say_so(cells: Cells) -> None:
    def change(context: Any) -> None:
        cells.database.change_cell(cells.uuids[0], transport_url=TWO)
        cellmw.refresh_cells(context, timeout=stack.SOON)

    often: dict[str, Any] = {"cell_refresh_interval": "3600"}
    assert cells.request(console_output, **often) == [ONE, "x"]
    cells.request(change, **often)
    assert cells.request(console_output, **often) == [TWO, "x"]


# Each as a script that a process runs to its end: the client has gone in the
# middle of the response, and what was streaming it is left to the collector.
_STREAMS = """
    import sys, oslo_messaging
    from cellmw import filter_factory, rpc, target_cell
    from tests.functional import stack

    database = stack.ApiDatabase(sys.argv[1])
    cell = database.add_cell("cellmw-memory://host/v")
    instance = database.add_instance(cell)
    client = rpc.get_client(oslo_messaging.Target(topic="t", server="s"))

    class Stream:
        def __init__(self, context):
            self._chunks = self.run(context)

        def __iter__(self):
            return self._chunks

        def run(self, context):
            {send}

    def api(environ, start_response):
        start_response("200 OK", [])
        return Stream(environ["cellmw.context"])

    served = filter_factory(
        {{}},
        oslo_config_config=stack.configuration(),
        api_database_connection=sys.argv[1],
    )(api)
    body = served(
        stack.environ_of(f"/servers/{{instance}}"), lambda *args: None
    )
    next(iter(body))
    {leave}
    print("done")
"""
_OF_ITS_OWN = """with target_cell(context, cell) as other:
                client.cast(other, "ping")
                yield b"chunk"
                yield b"chunk"
"""
_OF_THE_REQUEST = """client.cast(context, "ping")
            yield b"chunk"
            yield b"chunk"
"""


@pytest.mark.parametrize(
    "send,leave",
    [
        (_OF_ITS_OWN, "body.close(); del body"),
        (_OF_ITS_OWN, "pass"),
        (_OF_THE_REQUEST, "pass"),
        (_OF_THE_REQUEST, "kept = [body]; kept.append(kept); del body"),
    ],
)
def test_a_process_ends_whatever_is_still_leased(
    api_database: ApiDatabase, send: str, leave: str
) -> None:
    """At the end of an interpreter no thread can be started any more."""
    script = _STREAMS.format(send=send, leave=leave)
    assert stack.run_python(script, api_database.url).endswith("done\n")
