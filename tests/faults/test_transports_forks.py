# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""S6 on a real RabbitMQ: forks while leases are held.

A service runs in a process of its own, forks children of several kinds, and
does what the test tells it on its standard input.  What is asserted is what
the broker says of the connections, and what arrives.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import servers
from tests.fakes import PATIENCE
from tests.faults.service import Inbox, durable
from tests.functional import stack

pytestmark = pytest.mark.servers

_SERVICE = """
import ctypes, gc, json, os, sys, warnings
warnings.simplefilter("ignore")
import oslo_messaging
import cellmw
from cellmw import rpc, runtime
from tests.functional import stack
from tests.faults.service import HOST

database, instance, default = sys.argv[1:]
conf = stack.configuration(transport_url=default)
make = cellmw.filter_factory(
    {}, oslo_config_config=conf, api_database_connection=database
)
rpc.init(conf)
target = oslo_messaging.Target(topic=stack.TOPIC)
client, plain = rpc.get_client(target), rpc.get_default_client(target)
raw_fork = ctypes.PyDLL(None).fork
context = None


def send(number):
    client.prepare(server=HOST).cast(context, "reboot", number=number)


def send_default(number):
    plain.prepare(server=HOST).cast(context, "reboot", number=number)


def state():
    (made,) = runtime.registry()
    stats = made.process().pool.stats()
    return {"opened": stats.total.opened, "leases": stats.leases}


def child(kind, number):
    \"\"\"What a child does; True: it ends as a program does.\"\"\"
    global context
    if kind == "idle":
        return True
    if kind == "sends":
        send(number)
        send_default(number)
        context.mq_connection.release()
        return True
    if kind == "killed":
        send(number)
        return False
    if kind == "collects":
        context = None
        runtime.registry()._runtimes.clear()
        gc.collect()
        return True
    if kind == "shuts down":
        send(number)
        context.mq_connection.release()
        runtime.registry().close(10)
        return True
    if kind == "forks":
        pid = os.fork()
        if pid == 0:
            send(number)
            context.mq_connection.release()
            return True
        return os.waitpid(pid, 0)[1] == 0
    raise ValueError(kind)


def fork(kind, number, raw=False):
    pid = raw_fork() if raw else os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    # Its own standard output, or what the parent has buffered comes twice.
    sys.stdout = open(os.devnull, "w")
    ends_as_program = False
    try:
        ends_as_program = child(kind, number)
    except BaseException as error:
        print(f"{kind}: {error!r}", file=sys.stderr)
        os._exit(9)
    if ends_as_program:
        sys.exit(0)
    os._exit(0)


def answer(what):
    sys.stdout.write(json.dumps(what) + chr(10))
    sys.stdout.flush()


def application(environ, start_response):
    \"\"\"One request that lasts for the whole test, and holds a lease.\"\"\"
    global context
    context = environ["cellmw.context"]
    for line in sys.stdin:
        command, *args = json.loads(line)
        answer(globals()[command](*args))
    start_response("200 OK", [])
    return []


path = f"/servers/{instance}/action"
make(application)(stack.environ_of(path, "POST"), lambda *args: None)
"""


class Program:
    """The service, and what to tell it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, command: str, *args: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, *args]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            pytest.fail(
                f"the service has ended: {self._process.communicate()}"
            )
        return json.loads(line)

    def end(self) -> None:
        _, errors = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0, errors
        assert "Traceback" not in errors, errors


@pytest.fixture
def cell(vhost: servers.Vhost) -> Inbox:
    return Inbox(vhost.url)


@pytest.fixture
def default(make_vhost: Callable[[], servers.Vhost]) -> servers.Vhost:
    return make_vhost()


@pytest.fixture
def program(
    sqlite: servers.Database,
    vhost: servers.Vhost,
    default: servers.Vhost,
    cell: Inbox,
) -> Iterator[Program]:
    database = stack.ApiDatabase(sqlite.url)
    instance = database.add_instance(
        database.add_cell(durable(vhost.url), name="cell-one")
    )
    with (
        contextlib.closing(database),
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                _SERVICE,
                sqlite.url,
                instance,
                durable(default.url),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            yield Program(process)
        finally:
            process.kill()


def names(vhost: servers.Vhost) -> set[str]:
    """What the broker calls the connections; each has a port of its own."""
    return {row["name"] for row in vhost.connections()}


# Most end at once, for the end of an interpreter takes most of a second.
KINDS = ["killed"] * 16 + ["idle", "sends", "collects", "shuts down"]


@pytest.mark.parametrize(
    "raw,times",
    [pytest.param(False, 5, id="fork"), pytest.param(True, 1, id="no hooks")],
)
def test_s6_forks_with_live_leases(
    program: Program,
    vhost: servers.Vhost,
    default: servers.Vhost,
    cell: Inbox,
    raw: bool,
    times: int,
) -> None:
    """A hundred children, each kind in turn.

    The parent's messages go on, on the connections it had; the children's
    go out on others, which are gone with them.  Without hooks: as a server
    forks in C and tells the interpreter nothing of it.
    """
    default_inbox = Inbox(default.url)
    program.do("send", 0)
    program.do("send_default", 0)
    parents = names(vhost)
    parents_default = names(default)
    assert len(parents) == len(parents_default) == 1
    sent, sent_default = [0], [0]
    for number in range(1, times * len(KINDS) + 1):
        kind = KINDS[number % len(KINDS)]
        assert program.do("fork", kind, -number, raw) == 0, kind
        if kind in ("sends", "killed", "shuts down"):
            sent.append(-number)
        if kind == "sends":
            sent_default.append(-number)
        program.do("send", number)
        program.do("send_default", number)
        sent.append(number)
        sent_default.append(number)
    assert program.do("state") == {"opened": 1, "leases": 1}
    # What a child has opened is closed or cut when it is gone; the parent
    # has not had to connect again.
    stack.eventually(lambda: names(vhost) == parents, within=PATIENCE)
    stack.eventually(
        lambda: names(default) == parents_default, within=PATIENCE
    )
    assert sorted(cell.wait_for(len(sent))) == sorted(sent)
    assert sorted(default_inbox.wait_for(len(sent_default))) == sorted(
        sent_default
    )
    program.end()
    assert names(vhost) == set()


def test_s6_a_child_of_a_child(
    program: Program, vhost: servers.Vhost, cell: Inbox
) -> None:
    program.do("send", 0)
    parents = names(vhost)
    assert program.do("fork", "forks", 1) == 0
    program.do("send", 2)
    assert sorted(cell.wait_for(3)) == [0, 1, 2]
    stack.eventually(lambda: names(vhost) == parents, within=PATIENCE)
    program.end()
