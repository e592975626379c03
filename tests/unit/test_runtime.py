# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Runtimes and their registry, the state of a process, and forks; no I/O.

Messages go to memory brokers; the API database is a list.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg

from cellmw import exceptions, options, runtime, testing
from cellmw.cells import engines, store
from cellmw.cells.mapping import CellMapping
from cellmw.forks import keep_for_ever
from cellmw.janitor import Janitor
from cellmw.process import Process
from cellmw.redaction import KNOWN, Secret, install, scrub
from cellmw.runtime import Registry, Runtime
from cellmw.transports import oslo
from cellmw.transports.handle import Handle
from tests.directories import Clock
from tests.fakes import PATIENCE, Gate, Records, Threads, cell_uuid, in_child

PASSWORD = "pass-not-for-logs"


class Rows:
    """The API database: a few cells and no instance."""

    def __init__(self) -> None:
        self.rows: list[CellMapping] = []
        self.reads = 0

    def put(self, number: int, state: int = 0) -> None:
        uuid = cell_uuid(number)
        url = f"cellmw-memory://u:{PASSWORD}@host-{number}/v{state}"
        row = CellMapping(
            uuid=uuid, id=number, name="c", transport_url=Secret(url)
        )
        self.rows = [one for one in self.rows if one.uuid != uuid] + [row]

    def cells(self) -> list[CellMapping]:
        self.reads += 1
        return self.rows


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rows]:
    rows = Rows()
    rows.put(1)
    monkeypatch.setattr(store.Store, "cells", lambda self: rows.cells())
    with testing.own_brokers(), testing.no_leaks():
        yield rows


@pytest.fixture
def make(rows: Rows) -> Iterator[Callable[..., Runtime]]:
    """Makes runtimes; at the end each is closed, and has nothing open."""
    made: list[Runtime] = []

    def make(clock: Any = time.monotonic, **settings: Any) -> Runtime:
        conf = cfg.ConfigOpts()
        conf([], project="cellmw-test", default_config_files=[])
        oslo.prepare(conf)
        engines.register_options(conf)
        paste = {name: str(value) for name, value in settings.items()}
        made.append(Runtime(options.load(conf, paste), conf, clock=clock))
        return made[-1]

    yield make
    for each in made:
        current = each.current
        if current is not None and current.pid == os.getpid():
            assert each.close(PATIENCE) == 0
            total = current.pool.stats().total
            assert total.opened == total.closed


@contextlib.contextmanager
def handle_of(made: Runtime, number: int = 1) -> Iterator[Handle]:
    process = made.process()
    handle = Handle(process, process.directory.cell(cell_uuid(number)))
    try:
        yield handle
    finally:
        handle.release()


def cast(handle: Handle, topic: str = "t") -> None:
    target = oslo_messaging.Target(topic=topic, server="s")
    message = {"method": "ping", "args": {}}
    handle._send(target, {}, message, wait_for_reply=False)


def open_now(made: Runtime) -> int:
    return made.process().pool.stats().total.open


# What a runtime is.


def test_making_one_starts_and_opens_nothing(
    make: Callable[..., Runtime], rows: Rows
) -> None:
    before = threading.active_count()
    made = make()
    assert made.current is None
    made.process()
    assert threading.active_count() == before
    assert rows.reads == 0


def test_a_process_gets_one_state(make: Callable[..., Runtime]) -> None:
    made = make()
    assert made.process() is made.process()
    assert made.process().here() is made.process()


def test_threads_that_come_at_once_get_one_state(
    make: Callable[..., Runtime],
) -> None:
    for _ in range(10):
        made = make()
        barrier = threading.Barrier(8)
        found: list[Process] = []

        def get(
            made: Runtime = made,
            barrier: threading.Barrier = barrier,
            found: list[Process] = found,
        ) -> None:
            barrier.wait()
            found.append(made.process())

        with Threads() as threads:
            for _ in range(8):
                threads.start(get)
        assert len({id(each) for each in found}) == 1


def test_of_two_states_made_at_once_one_is_used(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    barrier = threading.Barrier(2)
    found: list[Process] = []

    def make_slowly(of: Runtime) -> Process:
        barrier.wait(PATIENCE)
        return Process(of)

    monkeypatch.setattr(runtime, "Process", make_slowly)
    with Threads() as threads:
        for _ in range(2):
            threads.start(lambda: found.append(made.process()))
    assert found[0] is found[1] is made.process()


def test_settings_reach_the_parts(make: Callable[..., Runtime]) -> None:
    made = make(
        transport_cache_size=7,
        transport_overflow="refuse",
        transport_idle_timeout=11,
        transport_max_lifetime=0,
        send_timeout=3,
    )
    pool = made.process().pool
    assert pool._max_size == 7
    assert pool._refuse_over_limit
    assert pool._idle_timeout == 11
    assert pool._max_lifetime == 0
    assert made.process().delivering.send_timeout == 3
    assert make(transport_cache="false").process().pool._max_size == 0


def test_a_message_goes_to_its_cell(
    make: Callable[..., Runtime], rows: Rows
) -> None:
    rows.put(2)
    made = make()
    with handle_of(made, 1) as one, handle_of(made, 2) as two:
        cast(one)
        cast(two)
        assert open_now(made) == 2


def test_what_changes_in_the_database_rotates(
    make: Callable[..., Runtime], rows: Rows
) -> None:
    made = make()
    with handle_of(made) as handle:
        cast(handle)
    rows.put(1, state=1)
    made.process().directory.refresh()
    pool = made.process().pool
    _until(lambda: pool.stats().total.closed == 1)
    with handle_of(made) as handle:
        cast(handle)
    assert pool.stats().total.opened == 2
    assert pool.stats().total.open == 1


def test_a_cell_that_is_known_is_used_where_the_database_is_gone(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    process = made.process()
    with handle_of(made) as handle:

        def fail(uuid: str, timeout: float | None = None) -> Any:
            raise exceptions.LookupFailed("gone")

        monkeypatch.setattr(process.directory, "cell", fail)
        cast(handle)


def test_the_cells_passwords_are_known_as_long_as_they_are_used(
    make: Callable[..., Runtime], rows: Rows
) -> None:
    gc.collect()
    made = make()
    before = len(KNOWN)
    with handle_of(made) as handle:
        assert PASSWORD not in scrub(f"it was {PASSWORD}")
        cast(handle)
        rows.rows = []
        made.process().directory.refresh()
        # The request still sends with it.
        assert PASSWORD not in scrub(f"it was {PASSWORD}")
    _until(lambda: made.process().pool.stats().total.closed == 1)
    del handle
    _until(lambda: gc.collect() >= 0 and len(KNOWN) <= before)


def test_a_factory_that_another_library_sets_is_stood_in_front_of(
    make: Callable[..., Runtime],
) -> None:
    before = logging.getLogRecordFactory()
    install()
    try:
        made = make(transport_idle_timeout=0.1)
        with handle_of(made) as handle:
            cast(handle)  # which starts the janitor
            logging.setLogRecordFactory(logging.LogRecord)
            _until(
                lambda: logging.getLogRecordFactory() is not logging.LogRecord
            )
            found = logging.getLogRecordFactory()
            record = found("nova", 20, "", 1, PASSWORD, (), None)
            assert PASSWORD not in record.getMessage()
    finally:
        logging.setLogRecordFactory(before)
        KNOWN.on_hold = bool


def test_what_the_configuration_says_by_then_is_known(
    make: Callable[..., Runtime],
) -> None:
    """It can be read again between the load and the first request."""
    made = make()
    password = "another-one-by-now"
    url = f"cellmw-memory://u:{password}@default/"
    made.conf.set_override("transport_url", url)
    assert password in scrub(password)
    process = made.process()
    assert password not in scrub(password)
    assert password not in repr(vars(process))


def test_the_option_of_a_short_password_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests may have had the same warnings, which come once.
    monkeypatch.setattr(KNOWN, "_warned", {})
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    engines.register_options(conf)
    conf.set_override("transport_url", "rabbit://u:short@host/")
    url = "sqlite://u:short@host/"
    conf.set_override("connection", url, "api_database")
    settings = options.load(conf, {})
    Runtime(settings, conf)
    Runtime(settings, conf, Secret(url))
    warned = [
        record.getMessage().partition(" has a password of less than")[0]
        for record in caplog.records
    ]
    assert warned == [
        "transport_url in [DEFAULT]",
        "connection in [api_database]",
        "api_database_connection in the paste section",
    ]
    assert "short" not in caplog.text


def test_the_column_of_a_short_password_is_named(
    make: Callable[..., Runtime],
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other tests may have had the same warnings, which come once.
    monkeypatch.setattr(KNOWN, "_warned", {})
    long = f"cellmw-memory://u:{PASSWORD}@host/v"
    rows.rows = [
        CellMapping(
            id=number,
            uuid=cell_uuid(number),
            name=f"cell-{number}",
            transport_url=Secret(transport),
            database_connection=Secret(database),
        )
        for number, transport, database in (
            (1, "cellmw-memory://u:short@host/v", long),
            (2, long, "sqlite://u:short@host/"),
        )
    ]
    directory = make().process().directory
    for number in (1, 2):
        assert directory.cell(cell_uuid(number)) is not None
    warned = {
        record.getMessage().partition(" has a password of less than")[0]
        for record in caplog.records
    }
    assert {
        f"transport_url of cell {cell_uuid(1)} (cell-1)",
        f"database_connection of cell {cell_uuid(2)} (cell-2)",
    } == warned


def test_what_is_gone_knows_no_password_any_more(rows: Rows) -> None:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    engines.register_options(conf)
    gc.collect()
    before = len(KNOWN)
    of_service = f"rabbit://u:{PASSWORD}@default/"
    conf.set_override("transport_url", of_service)
    made = [Runtime(options.load(conf, {}), conf)]
    with handle_of(made[0]) as handle:
        cast(handle)
    assert made[0].close(PATIENCE) == 0
    # The runtime's own, and its cell's.
    assert len(KNOWN) > before
    del handle
    made.clear()
    _until(lambda: gc.collect() >= 0 and len(KNOWN) <= before)


# Small things that are done now and then.


def test_what_is_idle_is_closed_without_traffic(
    make: Callable[..., Runtime],
) -> None:
    made = make(transport_idle_timeout=0.05)
    with handle_of(made) as handle:
        cast(handle)
    pool = made.process().pool
    _until(lambda: pool.stats().total.closed == 1)


def test_what_is_old_is_replaced_without_traffic(
    make: Callable[..., Runtime],
) -> None:
    made = make(transport_max_lifetime=0.05)
    with handle_of(made) as handle:
        cast(handle)
    pool = made.process().pool
    _until(lambda: pool.stats().total.closed == 1)


def test_a_closing_that_hangs_is_reported_without_traffic(
    make: Callable[..., Runtime],
) -> None:
    clock = Clock()
    made = make(clock=clock, transport_idle_timeout=0.1)
    closer = made.process().closer
    gate = Gate()

    class Transport:
        def cleanup(self) -> None:
            gate.wait()

    with Records() as records, handle_of(made) as handle:
        cast(handle)  # which starts the janitor
        closer.close(Transport(), cell_uuid(1))
        clock.now += 60
        _until(lambda: closer.hung == 1)
        gate.open()
        _until(lambda: records.matching("has ended after all"))


def test_a_handle_that_is_abandoned_is_released_soon(
    make: Callable[..., Runtime],
) -> None:
    made = make()
    process = made.process()
    # No round comes by itself for as long as the test lasts.
    process._janitor._interval = 3600
    handle = Handle(process, process.directory.cell(cell_uuid(1)))
    cast(handle)
    with process.pool._lock, process.closer._lock, process.lock:
        assert handle.abandon()
    _until(lambda: process.pool.stats().leases == 0)


def test_a_response_collected_under_a_lock_is_no_deadlock(
    make: Callable[..., Runtime],
) -> None:
    from cellmw.response_body import wrap

    made = make()
    process = made.process()
    handle = Handle(process, process.directory.cell(cell_uuid(1)))
    cast(handle)
    with Records() as records:
        body = wrap(iter(()), None, lambda error: None, handle)
        with process.pool._lock, process.closer._lock, process.lock:
            del body
        assert len(records.matching("WARNING Nobody closed a response")) == 1
    _until(lambda: process.pool.stats().leases == 0)


def test_a_handle_abandoned_after_the_shutdown_is_released(
    make: Callable[..., Runtime],
) -> None:
    made = make()
    process = made.process()
    handle = Handle(process, process.directory.cell(cell_uuid(1)))
    cast(handle)
    assert made.close(0) == 1
    assert handle.abandon()
    _until(lambda: process.pool.stats().leases == 0)


def test_a_janitor_goes_on_after_a_chore_that_fails() -> None:
    done = threading.Semaphore(0)

    def fail() -> None:
        raise OSError(f"rabbit://u:{PASSWORD}@host/")

    janitor = Janitor((fail, done.release), interval=0.001)
    with Records() as records:
        janitor.start()
        janitor.start()
        for _ in range(3):
            assert done.acquire(timeout=PATIENCE)
        janitor.stop()
    assert records.matching("Background maintenance failed: OSError")
    assert not records.matching(PASSWORD)


def test_a_janitor_is_woken_from_anywhere() -> None:
    done = threading.Semaphore(0)
    janitor = Janitor((lambda: done.release(),), interval=3600)
    janitor.start()
    for _ in range(3):
        janitor.wake()
        janitor.wake()
        assert done.acquire(timeout=PATIENCE)
    janitor.stop()
    janitor.wake()
    janitor.stop()


def test_a_janitor_that_is_stopped_is_not_started_again() -> None:
    janitor = Janitor((), interval=3600)
    janitor.stop()
    janitor.start()
    assert janitor._thread is None


def test_a_janitor_without_a_thread_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done = threading.Semaphore(0)
    janitor = Janitor((lambda: done.release(),), interval=0.001)
    monkeypatch.setattr(threading.Thread, "start", fail)
    janitor.start()
    monkeypatch.undo()
    janitor.start()
    assert done.acquire(timeout=PATIENCE)
    janitor.stop()


# The end.


def test_the_end_closes_all_and_ends_the_threads(
    make: Callable[..., Runtime],
) -> None:
    before = set(threading.enumerate())
    made = make()
    with handle_of(made) as handle:
        cast(handle)
    process = made.process()
    assert made.close(PATIENCE) == 0
    assert made.close(PATIENCE) == 0
    assert process.pool.stats().total.closed == 1
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_after_the_end_its_filters_refuse(
    make: Callable[..., Runtime],
) -> None:
    made = make()
    with handle_of(made) as handle:
        made.close(PATIENCE)
        with pytest.raises(exceptions.ShuttingDown):
            cast(handle)


def test_the_end_does_not_wait_for_longer_than_it_may(
    make: Callable[..., Runtime],
) -> None:
    made = make()
    process = made.process()
    with handle_of(made) as handle:
        cast(handle)
        with Records() as records:
            assert made.close(0.01) == 1
        assert records.matching("Shut down with 1 transports still in use")
        assert not process.pool.stats().total.closed
    _until(lambda: process.pool.stats().total.closed == 1)


def test_the_end_comes_though_closing_hangs(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    process = made.process()
    with handle_of(made) as handle:
        cast(handle)
    gate = Gate()
    real = oslo_messaging.transport.Transport.cleanup

    def hang(transport: Any) -> None:
        gate.wait()
        real(transport)

    monkeypatch.setattr(oslo_messaging.transport.Transport, "cleanup", hang)
    with Records() as records:
        assert made.close(0.01) == 0
    assert records.matching("1 still closing")
    gate.open()
    _until(lambda: process.pool.stats().total.closed == 1)


def test_the_end_closes_all_where_no_thread_can_be_started_any_more(
    make: Callable[..., Runtime],
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As at the end of a process on Python 3.12."""
    for number in (2, 3):
        rows.put(number)
    made = make()
    for number in (1, 2, 3):
        with handle_of(made, number) as handle:
            cast(handle)
    process = made.process()
    process.workers.close()

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with Records():
        assert made.close(PATIENCE) == 0
    assert process.pool.stats().total.closed == 3
    assert not process.closer.wait(0)


def test_the_end_in_the_middle_of_traffic(
    make: Callable[..., Runtime],
) -> None:
    for _ in range(10):
        made = make()
        process = made.process()
        process.directory.refresh()
        going = threading.Semaphore(0)

        def work(
            made: Runtime = made, going: threading.Semaphore = going
        ) -> None:
            while True:
                with handle_of(made) as handle:
                    try:
                        cast(handle)
                    except exceptions.ShuttingDown:
                        return
                going.release()

        with Threads() as threads:
            for _ in range(4):
                threads.start(_ignoring_lookups(work))
            for _ in range(8):
                assert going.acquire(timeout=PATIENCE)
            assert made.close(PATIENCE) == 0
        total = process.pool.stats().total
        assert total.opened == total.closed == 1


# Several of them.


def test_equal_settings_share_one_runtime(
    make: Callable[..., Runtime],
) -> None:
    registry = Registry()
    one = registry.get("a", make)
    assert registry.get("a", make) is one
    assert not registry.several
    other = registry.get("b", make)
    assert other is not one
    assert list(registry) == [one, other]
    assert len(registry) == 2
    assert registry.several
    registry.discard(one)
    assert list(registry) == [other]
    assert not registry.several


class Context:
    mq_connection: Any = None


def test_the_runtime_of_a_context(make: Callable[..., Runtime]) -> None:
    registry = Registry()
    with pytest.raises(LookupError, match="no cellmw filter"):
        registry.of(Context())
    one = registry.get("a", make)
    assert registry.of(Context()) is one
    other = registry.get("b", make)
    with pytest.raises(LookupError, match="several"):
        registry.of(Context())
    context = Context()
    with handle_of(other) as handle:
        context.mq_connection = handle
        assert registry.of(context) is other
    assert registry.of(context) is other


def test_a_context_without_a_handle_is_remembered(
    make: Callable[..., Runtime],
) -> None:
    registry = Registry()
    registry.get("a", make)
    other = registry.get("b", make)
    context = Context()
    registry.remember(context, other)
    assert registry.of(context) is other
    with pytest.raises(LookupError):
        registry.of(Context())
    del context
    gc.collect()
    assert not registry._came_through
    registry.remember(7, other)  # takes no weak reference


def test_the_registry_closes_what_was_used_in_this_process(
    make: Callable[..., Runtime],
) -> None:
    registry = Registry()
    used, unused = registry.get("a", make), registry.get("b", make)
    with handle_of(used) as handle:
        cast(handle)
    registry.close(PATIENCE)
    assert used.process().pool.stats().total.closed == 1
    assert unused.current is None


# Forks.


def test_a_child_works_with_its_own(make: Callable[..., Runtime]) -> None:
    made = make()
    with handle_of(made) as handle:
        cast(handle)
        process = made.process()

        def child() -> tuple[bool, int, int]:
            own = made.process()
            cast(handle)
            opened = own.pool.stats().total.opened
            handle.release()
            return own is process, opened, made.close(PATIENCE)

        # Other threads of the parent have these when it forks.
        with process.pool._lock, process.lock, process.closer._lock:
            assert in_child(child) == (False, 1, 0)
        cast(handle)
        assert process.pool.stats().total.opened == 1


def test_a_child_works_where_the_server_calls_no_fork_hooks(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As uWSGI does by default: only the process id tells."""
    made = make()
    with handle_of(made) as handle:
        cast(handle)
        parents = made.process()
        # What the child finds without the hook.
        monkeypatch.setattr(parents, "pid", os.getpid() + 1)
        made._processes.clear()
        before = sys.getrefcount(parents)
        own = made.process()
        assert own is not parents
        # The runtime lets go of it, and what is kept for ever does not.
        assert sys.getrefcount(parents) == before
        assert made.process() is own
        cast(handle)
        assert own.pool.stats().leases == 1
        assert parents.pool.stats().leases == 1
        handle.release()
        assert own.close(PATIENCE) == 0
        monkeypatch.undo()
        made.current = parents
        for entry in parents.pool._everything():
            entry.leases = 0


def test_a_child_with_a_process_id_that_was_there_before(
    make: Callable[..., Runtime],
) -> None:
    made = make()
    process = made.process()

    def child() -> bool:
        # The parent's had this id, and its state looks like the child's.
        process.pid = os.getpid()
        return made.process() is process

    assert not in_child(child)


def test_what_is_kept_for_ever_is_never_collected() -> None:
    class Thing:
        pass

    kept, let_go = Thing(), Thing()
    found = weakref.ref(kept), weakref.ref(let_go)
    keep_for_ever(kept)
    del kept, let_go
    gc.collect()
    assert found[0]() is not None
    assert found[1]() is None


def test_a_child_that_asks_for_nothing_collects_nothing(
    make: Callable[..., Runtime],
) -> None:
    made = make()
    process = made.process()
    found = weakref.ref(process)

    def child() -> tuple[bool, bool]:
        nonlocal made, process
        gone = made.current is None
        del made, process
        gc.collect()
        return gone, found() is not None

    assert in_child(child) == (True, True)


def test_at_its_end_a_child_keeps_what_is_its_parents(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server calls no fork hooks."""
    registry = Registry()
    made = registry.get("a", make)
    process = made.process()
    kept: list[object] = []
    monkeypatch.setattr(runtime, "keep_for_ever", kept.append)
    monkeypatch.setattr(process, "pid", os.getpid() + 1)
    registry.close()
    assert kept == [process]
    monkeypatch.undo()
    assert not process.pool._closed


def test_a_child_of_a_child_has_its_own(make: Callable[..., Runtime]) -> None:
    made = make()
    process = made.process()

    def grandchild(parents: Process) -> Callable[[], bool]:
        def run() -> bool:
            own = made.process()
            return own is not parents and own is not process

        return run

    def child() -> bool:
        own = made.process()
        return own is not process and in_child(grandchild(own))

    assert in_child(child)


def _ignoring_lookups(function: Callable[[], None]) -> Callable[[], None]:
    """The directory is closed with the rest, and says so in its way."""

    def run() -> None:
        with contextlib.suppress(exceptions.LookupFailed):
            function()

    return run


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.002)
