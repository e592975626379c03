# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What other readers of a path make of it: Routes, Nova, a database.

Where one of them could find an instance, a message does not go to the
default queue (invariant: fail closed).
"""

from __future__ import annotations

import io
import os
import posixpath
import random
import re
import sys
import unicodedata
import uuid as uuids
from collections.abc import Callable
from typing import Any
from urllib import parse
from wsgiref import handlers

import oslo_messaging
import pytest
import routes
from oslo_utils import uuidutils
from routes.middleware import RoutesMiddleware

from cellmw import exceptions, rpc
from tests import nova_routes
from tests.functional import stack
from tests.functional.stack import ApiDatabase, MakeFilter, Serve
from tests.unit.test_middleware import Runtime, filtered

DEFAULT = "cellmw-memory://default/"
# For each of five seeds.
PATHS = 20_000
VERSIONS = ("", "/v2", "/v2.1")


def nova_mapper() -> routes.Mapper:
    """Nova's routes, with the version in front as well."""
    mapper = routes.Mapper()
    for version in VERSIONS:
        for template in nova_routes.ROUTES:
            for project in (nova_routes.PROJECT, ""):
                mapper.connect(
                    f"{version}{project}{template}",
                    controller=template,
                    action="any",
                )
    return mapper


MAPPER = nova_mapper()


def instance_of(path: str) -> str | None:
    """What Nova's router takes for the id of an instance, if anything."""
    # Routes has no annotations.
    found: Any = MAPPER.match(path)
    if not found:
        return None
    key = nova_routes.instance_key(found["controller"])
    return None if key is None else found[key]


def decoded_again(text: str) -> str:
    try:
        return text.encode("latin-1").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text


def without_accents(text: str) -> str:
    parts = unicodedata.normalize("NFKD", text)
    return "".join(c for c in parts if not unicodedata.combining(c))


def without_controls(text: str) -> str:
    return "".join(
        c for c in text if unicodedata.category(c) not in ("Cc", "Cf")
    )


def normal(text: str) -> str:
    made = posixpath.normpath(text)
    return made.replace("//", "/", 1) if made.startswith("//") else made


# What routers, proxies and frameworks do to a path before they look at it.
PATH_READERS: tuple[Callable[[str], str], ...] = (
    str,
    decoded_again,
    normal,
    str.lower,
    str.strip,
    parse.unquote,
    without_controls,
    lambda path: re.sub("/+", "/", path),
    lambda path: path.replace("\\", "/"),
    lambda path: re.sub(r";[^/]*", "", path),
    lambda path: path.partition("?")[0],
    lambda path: path.encode("ascii", "ignore").decode(),
    lambda path: unicodedata.normalize("NFKC", decoded_again(path)).lower(),
    lambda path: normal(re.sub(r";[^/]*", "", path).replace("\\", "/")),
)


def by_parser(text: str) -> str:
    try:
        return str(uuids.UUID(text))
    except ValueError:
        return text


# What handlers and databases do to an id.
ID_READERS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    by_parser,
    without_controls,
    lambda text: without_accents(decoded_again(text)),
    lambda text: re.split(r"[^0-9A-Za-z-]", text)[0],
    lambda text: re.sub(r"\W", "", text, flags=re.ASCII),
)
contains_uuid = re.compile(
    r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}",
    re.IGNORECASE,
).search


def may_be_instance(text: str) -> bool:
    return any(
        uuidutils.is_uuid_like(read(text)) or contains_uuid(read(text))
        for read in ID_READERS
    )


def some_reader_sees_an_instance(path: str) -> bool:
    for text in {read(path) for read in PATH_READERS}:
        found = instance_of(text)
        if found is not None and may_be_instance(found):
            return True
    return False


def utf8(text: str) -> str:
    """As a server decodes it (PEP 3333)."""
    return text.encode().decode("latin-1")


ODD = (
    *map(chr, range(0x21)),
    *(chr(value) for value in range(0x7F, 0xA1)),
    *(utf8(c) for c in "\xa0\xad\u0301\u200b\u2028\u2060\u3000\ufeff\uff0f"),
    *("/", "//", "/./", "/../", "/x/../", "\\", "%2F", "%20", "%00", "%0A"),
    *(";", ";a=b", ".json", ".xml", ",", "?", "#", "{", "}", "urn:uuid:"),
    *("'", '"', "0", "-", "_", "x", "%", "&", "="),
)
FULL_WIDTH = {ord(c): utf8(chr(ord(c) + 0xFEE0)) for c in "0123456789abcdef"}


class Paths:
    """Paths of the compute API, most of them distorted."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def uuid(self) -> str:
        made = uuids.UUID(int=self._chance.getrandbits(128), version=4)
        return str(made)

    def plain(self, templates: tuple[str, ...]) -> str:
        chance = self._chance
        project = chance.choice(("", "", self.uuid(), self.uuid()))
        if chance.random() < 0.5:
            project = project.replace("-", "")
        path = re.sub(
            r"\{\w+\}",
            lambda _: self.uuid(),
            chance.choice(templates),
        )
        front = f"/{project}" if project else ""
        return f"{chance.choice(VERSIONS)}{front}{path}"

    def distorted(self, templates: tuple[str, ...]) -> str:
        path = self.plain(templates)
        for _ in range(self._chance.choice((1, 1, 1, 2, 3))):
            path = self._chance.choice(self._ways)(self, path)
        return path

    def _insert(self, path: str) -> str:
        # At a boundary of segments more often than anywhere.
        places = [m.end() for m in re.finditer(r"/|\Z|(?=/)", path)]
        places.append(self._chance.randrange(len(path) + 1))
        at = self._chance.choice(places)
        return path[:at] + self._chance.choice(ODD) + path[at:]

    def _change_case(self, path: str) -> str:
        return "".join(
            c.upper() if self._chance.random() < 0.2 else c for c in path
        )

    def _change_uuid(self, path: str) -> str:
        def change(found: re.Match[str]) -> str:
            text = found[0]
            return self._chance.choice(
                (
                    text.replace("-", ""),
                    text.upper(),
                    f"{{{text}}}",
                    f"urn:uuid:{text}",
                    text.translate(FULL_WIDTH),
                    text.replace("e", utf8("\xe9")),
                    text.replace("-", utf8("\u2010")),
                    parse.quote(text[0]).join(("", text[1:])),
                    f"%{ord(text[0]):x}{text[1:]}",
                    f"{text}{self._chance.choice(ODD)}",
                    f"{self._chance.choice(ODD)}{text}",
                )
            )

        uuid = r"[0-9a-f]{8}-[0-9a-f-]{27}"
        return re.sub(uuid, change, path)

    _ways = (_insert, _insert, _change_case, _change_uuid)


INSTANCE_ROUTES = tuple(
    template
    for template in nova_routes.ROUTES
    if nova_routes.instance_key(template) is not None
)
OTHER_ROUTES = tuple(set(nova_routes.ROUTES) - set(INSTANCE_ROUTES))


class Context:
    """A service's own."""

    mq_connection: Any = None
    cell_uuid: Any = None


class Filter:
    """The filter alone, and what it leaves on a context."""

    def __init__(self) -> None:
        self._application = filtered(lambda *args: [], Runtime())

    def connection(self, path: str) -> Any:
        context = Context()
        environ = {
            "REQUEST_METHOD": "DELETE",
            "PATH_INFO": path,
            "cellmw.context": context,
        }
        self._application(environ, lambda *args: lambda data: None)
        return context.mq_connection


@pytest.fixture(params=["one", "two", "three", None, None])
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Seeds that are always the same, and some that are new in each run."""
    seed = request.param or os.urandom(8).hex()
    # Shown where the test fails.
    sys.stdout.write(f"seed: {seed!r}\n")
    return random.Random(seed)


def test_what_a_reader_takes_for_an_instance_never_stays_without_connection(
    chance: random.Random,
) -> None:
    served = Filter()
    without = 0
    paths = Paths(chance)
    for number in range(PATHS):
        path = paths.distorted(
            INSTANCE_ROUTES if number % 8 else nova_routes.ROUTES
        )
        if served.connection(path) is None:
            without += 1
            assert not some_reader_sees_an_instance(path), repr(path)
    # A filter that refused everything would pass as well.
    assert PATHS // 100 < without < PATHS // 4


def test_no_plain_route_without_an_instance_is_refused(
    chance: random.Random,
) -> None:
    served = Filter()
    paths = Paths(chance)
    for _ in range(PATHS // 10):
        path = paths.plain(OTHER_ROUTES)
        assert instance_of(path) is None
        assert served.connection(path) is None, repr(path)
        path = paths.plain(INSTANCE_ROUTES)
        assert instance_of(path) is not None
        assert served.connection(path) is not None, repr(path)


# Through a server


def handled(application: Any, request: str) -> bytes:
    """Let the standard library's server handle one request line."""
    method, _, target = request.partition(" ")
    environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        # As wsgiref.simple_server and waitress decode it.
        "PATH_INFO": parse.unquote(target, "latin-1"),
        "QUERY_STRING": "",
        "SERVER_NAME": "host",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
    }
    out = io.BytesIO()
    handlers.SimpleHandler(io.BytesIO(), out, io.StringIO(), environ).run(
        application
    )
    return out.getvalue()


@pytest.mark.parametrize(
    "distort",
    [
        "{}%0A",
        "{}%20",
        "{}.json",
        "{}%00",
        "{}%E2%80%8B",
        "%EF%BB%BF{}",
        "{};a=b",
        "%7B{}%7D",
        "urn:uuid:{}",
    ],
)
def test_nothing_reaches_the_default_queue(
    distort: str,
    make_filter: MakeFilter,
    api_database: ApiDatabase,
    serve: Serve,
) -> None:
    host = serve(DEFAULT)
    rpc.init(stack.configuration(transport_url=DEFAULT))
    instance = api_database.add_instance(
        api_database.add_cell("cellmw-memory://one/cell1")
    )
    client = rpc.get_client(oslo_messaging.Target(topic=stack.TOPIC))
    seen: list[str] = []

    def delete(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        _, match = environ["wsgiorg.routing_args"]
        seen.append(match["id"])
        client.prepare(server="host").cast(
            environ["cellmw.context"], "reboot_instance", instance_uuid="x"
        )
        start_response("202 Accepted", [])
        return []

    router = RoutesMiddleware(delete, MAPPER, singleton=False)
    application = make_filter()(router)
    path = distort.format(instance)
    answer = handled(application, f"DELETE /v2.1/servers/{path}")
    # The router found a server all the same.
    assert instance in seen[0]
    assert b" 503 " in answer.partition(b"\r\n")[0]
    assert exceptions.AmbiguousPath.__name__.encode() not in answer
    client.prepare(server="host").call(
        {}, "get_console_output", instance_uuid="last"
    )
    assert host.instances() == ["last"]
