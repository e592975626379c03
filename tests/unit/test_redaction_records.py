# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Log records lose their secrets before any handler sees them."""

from __future__ import annotations

import collections
import collections.abc
import copy
import datetime
import functools
import io
import json
import logging
import pickle
import queue
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from logging import handlers
from typing import Any

import oslo_messaging
import pytest
import sqlalchemy
from oslo_config import cfg
from oslo_log import formatters
from oslo_log import log as oslo_log

from cellmw.redaction import KNOWN, Secret, copies, install, records

PASSWORD = "hunter-two"
SHORT = "amqp://nova:guest@h:5672/vh"
SHORT_SHOWN = "amqp://***@h:5672/vh"


class _List(logging.Handler):
    """Keeps the records, and what a plain formatter makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.text = ""

    def alone(self) -> None:
        """Turn off the test runner's: they raise what others report."""
        logging.root.handlers[:] = [self]

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        try:
            self.text += self.format(record) + "\n"
        except Exception:
            self.handleError(record)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[_List]:
    """What comes out of all loggers, with one known password."""
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(KNOWN, "on_hold", bool)
    handler = _List()
    monkeypatch.setattr(logging.root, "handlers", [handler])
    monkeypatch.setattr(logging.root, "level", 1)
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]  # levels
    install()
    with KNOWN.hold(Secret(f"rabbit://u:{PASSWORD}@h/")):
        yield handler
    logging.setLogRecordFactory(factory)


LOGGERS = (
    "cellmw",
    "cellmw.transports.pool",
    "oslo_messaging",
    "oslo.messaging._drivers.impl_rabbit",
    "kombu.connection",
    "amqp",
    "sqlalchemy.engine.Engine",
    "oslo_db.sqlalchemy.engines",
    "nova.compute.rpcapi",
    "root",
)


class _Shows:
    """An object whose text is made when somebody asks for it."""

    def __init__(self, text: str, shown_as: str = "<it>") -> None:
        self._text = text
        self._shown_as = shown_as

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._shown_as


@pytest.mark.parametrize("name", LOGGERS)
def test_the_records_of_all_loggers_are_scrubbed(
    log: _List, name: str
) -> None:
    logger = logging.getLogger(name)
    logger.warning("the password is %s, the URL %s", PASSWORD, SHORT)
    assert log.text == f"the password is ***, the URL {SHORT_SHOWN}\n"


Args = tuple[object, ...]


@pytest.mark.parametrize(
    "msg, args, shown",
    [
        (f"a {PASSWORD}", (), "a ***"),
        (f"100% of {PASSWORD}", (), "100% of ***"),
        (f"a {PASSWORD} %s %d", ("b", 3), "a *** b 3"),
        (f"%d%% of {PASSWORD}", (3,), "3% of ***"),
        ("a %s %d %5.2f", (PASSWORD, 3, 0.5), "a *** 3  0.50"),
        ("a %(x)s %(n)d", ({"x": PASSWORD, "n": 3},), "a *** 3"),
        ("a %s", ({"x": PASSWORD},), "a {'x': '***'}"),
        ("a %s", ({PASSWORD: 1},), "a {'***': 1}"),
        ("a %s", ([1, PASSWORD, (PASSWORD,)],), "a [1, '***', ('***',)]"),
        ("a %s", ({PASSWORD},), "a {'***'}"),
        ("a %r", (PASSWORD,), "a '***'"),
        ("a %s", (PASSWORD.encode(),), "a b'***'"),
        ("a %s", (ValueError(PASSWORD),), "a ***"),
        ("a %s", (_Shows(PASSWORD),), "a ***"),
        ("a %r", (_Shows("x", PASSWORD),), "a ***"),
        ("a %s %d", (_Shows(PASSWORD), 3), "a *** 3"),
        (ValueError(f"a {PASSWORD}"), (), "a ***"),
        (_Shows(f"a {PASSWORD} %s"), ("b",), "a *** b"),
        (_Shows("a %s"), (PASSWORD,), "a ***"),
        # In pieces, and so short that only the whole tells it.
        ("%s://%s:%s@%s/", ("amqp", "u", "guest", "h"), "amqp://***@h/"),
        ("a %s%s", ("hunter", "-two"), "a ***"),
        ("a %.6s", (PASSWORD,), "a ***"),
        ("a %s", (_Shows(SHORT),), f"a {SHORT_SHOWN}"),
    ],
)
def test_a_message_loses_its_secrets(
    log: _List, msg: object, args: Args, shown: str
) -> None:
    logging.getLogger("kombu").info(msg, *args)
    assert log.text == f"{shown}\n"
    record = log.records[0]
    everything = f"{record.msg!s}{record.msg!r}{record.args!s}{record.args!r}"
    assert PASSWORD not in everything
    assert "guest@" not in everything


class _Int(int):
    pass


@pytest.mark.parametrize(
    "msg, args",
    [
        ("nothing", ()),
        ("100%", ()),
        ("a %s %d %5.2f %x", ("b", 3, 0.5, 255)),
        ("a %(x)s %(n)d", ({"x": "b", "n": 3, "unused": "c"},)),
        ("a %s", ({"x": 1},)),
        ("a %s %s", ([1], ValueError("x"))),
        ("a %s %d", (_Shows("b"), _Int(3))),
        ("a %s", (None,)),
        ("a %s", (Secret(PASSWORD),)),
        ("a %s", (datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC),)),
        ("a %.1s", ("bc",)),
        ("see %s", ("http://h/?a=b",)),
        ("see http://%s/?a=%s", ("h", "b")),
        ("see %s", (SHORT_SHOWN,)),
        (_Shows("b"), ()),
        (ValueError("b"), ()),
        ("wrong %d", ("b",)),
        ("wrong", ("b",)),
        ("wrong %(x)s", ("b",)),
    ],
)
@pytest.mark.parametrize("name", ["kombu", "cellmw"])
def test_a_record_without_a_secret_stays_as_it_is(
    log: _List,
    name: str,
    msg: object,
    args: Args,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log.alone()
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logging.getLogger(name).info(msg, *args)
    if args and isinstance(args[0], Mapping):
        assert log.records[0].args is args[0]
    else:
        record_args = log.records[0].args
        assert isinstance(record_args, tuple)
        assert len(record_args) == len(args)
        for kept, arg in zip(record_args, args, strict=True):
            # What stands in for an object looks like it.
            assert kept is arg or isinstance(arg, _Shows)
            assert kept == arg
            assert isinstance(kept, type(arg))
    assert log.records[0].msg == msg
    assert vars(log.records[0]).keys() == vars(
        logging.LogRecord("", 0, "", 0, "", (), None)
    ).keys() | ({"message"} if log.text else set())


def test_arguments_that_are_clean_keep_their_types(log: _List) -> None:
    now = datetime.datetime.now(datetime.UTC)
    logging.getLogger("kombu").info(
        "%s %d %s %s", PASSWORD, 3, now, {"a": [1, PASSWORD]}
    )
    assert log.records[0].msg == "%s %d %s %s"
    assert log.records[0].args == ("***", 3, now, {"a": [1, "***"]})


def test_a_record_that_cannot_be_formatted_shows_no_secret(
    log: _List, capsys: pytest.CaptureFixture[str]
) -> None:
    # The handler writes the message and the arguments to standard error.
    log.alone()
    # As careless services do.
    logging.getLogger("kombu").info(PASSWORD + " %d", PASSWORD)  # noqa: G003
    logging.getLogger("kombu").info("%d %d", _Shows(PASSWORD), {"a": PASSWORD})
    shown = capsys.readouterr().err
    assert shown.count("--- Logging error ---") == 2
    assert PASSWORD not in shown
    assert len(log.records) == 2


class _Counts:
    """An object that counts how often it is shown."""

    def __init__(self) -> None:
        self.shown = collections.Counter[str]()

    def __str__(self) -> str:
        self.shown["str"] += 1
        return "text"

    def __repr__(self) -> str:
        self.shown["repr"] += 1
        return "text"


def _log_options() -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    oslo_log.register_options(conf)
    return conf


class _CountsAsError(_Counts, Exception):
    pass


@pytest.mark.parametrize("kind", [_Counts, _CountsAsError])
@pytest.mark.parametrize(
    "formatter",
    [
        None,
        formatters.JSONFormatter(),
        formatters.ContextFormatter(config=_log_options()),
    ],
)
@pytest.mark.parametrize(
    "log_it",
    [
        lambda logger, one: logger.error("%s", one),
        lambda logger, one: logger.error("%(a)s %(a)r", {"a": one}),
        lambda logger, one: logger.error("%s", [one, {"a": one}]),
        lambda logger, one: logger.error("%s %d", ValueError(one), 1),
        lambda logger, one: logger.error(one),
        lambda logger, one: logger.debug("%s", one),
    ],
)
def test_an_argument_is_shown_as_often_as_without_us(
    log: _List,
    kind: type[_Counts],
    formatter: logging.Formatter | None,
    log_it: Callable[[logging.Logger, object], None],
) -> None:
    log.setFormatter(formatter)
    log.setLevel(logging.INFO)
    ours = logging.getLogRecordFactory()
    counts = []
    for factory in (logging.LogRecord, ours):
        logging.setLogRecordFactory(factory)
        one = kind()
        log_it(logging.getLogger("kombu"), one)
        counts.append(one.shown)
    assert counts[0] == counts[1]


class _Fails:
    def __str__(self) -> str:
        raise ValueError(PASSWORD)

    __repr__ = __str__


def test_an_argument_that_cannot_be_shown_fails_as_without_us(
    log: _List, capsys: pytest.CaptureFixture[str]
) -> None:
    log.alone()
    logging.getLogger("kombu").info("a %s %s", _Fails(), "b")
    shown = capsys.readouterr().err
    assert shown.count("--- Logging error ---") == 1
    assert "ValueError: ***" in shown
    assert PASSWORD not in shown


def test_containers_that_hold_themselves_are_scrubbed(log: _List) -> None:
    circle: list[object] = [PASSWORD]
    circle.append(circle)
    logging.getLogger("kombu").info("a %s", circle)
    assert PASSWORD not in log.text
    assert PASSWORD not in repr(log.records[0].args)


def test_parsed_urls_are_scrubbed(log: _List) -> None:
    conf = cfg.ConfigOpts()
    for password in (PASSWORD, "guest"):
        parsed = oslo_messaging.TransportURL.parse(
            conf, f"rabbit://u:{password}@h/"
        )
        engine_url = sqlalchemy.make_url(f"mysql://u:{password}@h/db")
        logging.getLogger("nova").info("%s %s", parsed, engine_url)
        shown = formatters.JSONFormatter().format(log.records[-1])
        assert f"u:{password}" not in log.text
        # As a tuple it shows what its repr hides.
        assert json.loads(shown)["args"][1] == "mysql://***@h/db"
    assert PASSWORD not in repr(log.records[0].args)


def test_stack_info_and_a_ready_traceback_are_scrubbed(log: _List) -> None:
    logging.getLogger("kombu").handle(
        logging.getLogRecordFactory()(
            "kombu", 20, "", 0, "a", (), None, None, f"stack {PASSWORD}"
        )
    )
    assert log.text == "a\nstack ***\n"


def _log_failure(
    name: str = "kombu", msg: str = "failed", *args: object
) -> None:
    # An exception is being handled: that of _fail.
    logging.getLogger(name).exception(msg, *args)  # noqa: LOG004


def _fail(log_it: Callable[[], None]) -> None:
    password = PASSWORD
    try:
        try:
            raise ValueError(f"inner {password}")
        except ValueError as error:
            error.add_note(f"note {password}")
            raise OSError(f"outer {password}") from error
    except OSError:
        log_it()


@pytest.mark.parametrize("name", LOGGERS)
def test_an_exception_is_scrubbed_with_its_chain_and_variables(
    log: _List, name: str
) -> None:
    _fail(lambda: _log_failure(name))
    assert "OSError: outer ***" in log.text
    assert "ValueError: inner ***" in log.text
    assert "note ***" in log.text
    info = log.records[0].exc_info
    assert info is not None
    assert info[0] is OSError
    shown = traceback.TracebackException(*info, capture_locals=True)
    assert PASSWORD not in "".join(shown.format())


def test_an_exception_that_is_handed_over_is_scrubbed(log: _List) -> None:
    error = ValueError(PASSWORD)
    logging.getLogger("kombu").error("failed", exc_info=error)
    logging.getLogger("kombu").error("failed", exc_info=(None, None, None))
    assert log.text.startswith("failed\nValueError: ***\n")
    assert error.args == (PASSWORD,)  # only the copy is scrubbed


def test_a_traceback_other_than_its_exceptions_own_is_scrubbed(
    log: _List,
) -> None:
    password = PASSWORD
    try:
        raise ValueError
    except ValueError as error:
        first = error.__traceback__
        error.__traceback__ = None
        logging.getLogger("kombu").error(
            "failed", exc_info=(ValueError, error, first)
        )
    info = log.records[0].exc_info
    assert info is not None
    assert info[2] is not None
    assert info[2].tb_frame.f_locals == {}
    assert password in first.tb_frame.f_locals.values()  # type: ignore[union-attr]  # is not None


def test_an_exception_that_cannot_be_copied_is_told(
    log: _List, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "bare_copy", None)
    _fail(_log_failure)
    assert log.text.endswith("Exception: OSError: outer ***\n")


def test_a_record_that_cannot_be_scrubbed_shows_nothing(
    log: _List, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_clean_message", None)
    _fail(lambda: _log_failure("kombu", "a %s", PASSWORD))
    assert log.text == (
        "this record is withheld: scrubbing it failed with TypeError\n"
    )


class _Locals(logging.Formatter):
    # The base class calls it so.
    def formatException(self, ei: Any) -> str:  # noqa: N802
        shown = traceback.TracebackException(*ei, capture_locals=True)
        return "".join(shown.format())


@pytest.mark.parametrize(
    "formatter",
    [
        logging.Formatter("%(asctime)s %(message)s"),
        logging.Formatter("{message} {args}", style="{"),
        formatters.JSONFormatter(),
        formatters.FluentFormatter(),
        _Locals(),
    ],
)
def test_no_formatter_shows_a_secret(
    log: _List, formatter: logging.Formatter
) -> None:
    def log_all() -> None:
        logger = logging.getLogger("oslo_messaging")
        shows = {"b": _Shows("c", PASSWORD)}
        _log_failure("oslo_messaging", "a %s %s", PASSWORD, shows)
        logger.error("a %(b)s", {"b": PASSWORD, "c": PASSWORD})
        # No exception is given; oslo.log takes the one that is handled.
        logger.warning("failed")

    _fail(log_all)
    shown = "".join(str(formatter.format(record)) for record in log.records)
    assert PASSWORD not in shown
    assert "***" in shown


def test_oslo_logs_summary_of_an_exception_is_scrubbed_once(
    log: _List,
) -> None:
    _fail(lambda: logging.getLogger("nova").warning("failed"))
    first = formatters._get_error_summary
    _fail(lambda: logging.getLogger("nova").warning("failed"))
    assert formatters._get_error_summary is first

    def summarize() -> None:
        shown.append(first(log.records[0]))

    shown: list[str] = []
    _fail(summarize)
    assert shown == ["OSError: outer ***"]


@pytest.mark.parametrize(
    "msg, args",
    [
        ("path %s", ("/a\nERROR forged",)),
        ("path /a\r\nERROR forged", ()),
        ("path %(p)s", ({"p": "/a\u2028ERROR forged"},)),
        ("path %s", (_Shows("/a\x1b[1AERROR forged"),)),
        ("path %s\n", ("/a",)),
    ],
)
def test_nothing_injects_a_line_into_our_records(
    log: _List, msg: str, args: Args
) -> None:
    logging.getLogger("cellmw.middleware").warning(msg, *args)
    assert len(log.text.splitlines()) == 1
    assert log.text[:-1].isprintable()


def test_other_loggers_keep_their_lines(log: _List) -> None:
    logging.getLogger("nova").warning("a\n%s", "b\tc")
    assert log.text == "a\nb\tc\n"


def test_install_is_done_once(log: _List) -> None:
    factory = logging.getLogRecordFactory()
    install()
    assert logging.getLogRecordFactory() is factory


@pytest.fixture
def _no_scope(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(records, "_scopes", set())
    records._scope_of.cache_clear()
    yield
    records._scope_of.cache_clear()


@pytest.mark.parametrize(
    "scopes, scrubbed",
    [
        ([((), ())], {"nova", "nova.api", "nova.api.x", "novax", "root"}),
        ([(["nova"], ())], {"nova", "nova.api", "nova.api.x"}),
        ([((), ["nova.api"])], {"nova", "novax", "root"}),
        ([(["nova"], ["nova.api"])], {"nova"}),
        ([(["root"], ()), (["novax"], ())], {"novax", "root"}),
        ([((), ["nova"]), (["nova.api"], ())], {"nova.api", "nova.api.x"}),
    ],
)
@pytest.mark.usefixtures("_no_scope")
def test_loggers_can_be_chosen_and_left_out(
    log: _List, scopes: list[Any], scrubbed: set[str]
) -> None:
    # What the fixture has installed covers all.
    records._scopes.clear()
    for loggers, left_out in scopes:
        install(loggers, left_out)
    if scopes[-1] == (["nova.api"], ()):
        scrubbed = scrubbed | {"novax", "root"}
    for name in ("nova", "nova.api", "nova.api.x", "novax", "root", "cellmw"):
        log.text = ""
        logging.getLogger(name).warning(PASSWORD)
        expected = name in scrubbed or name == "cellmw"
        assert (log.text == "***\n") is expected


class _OtherRecord(logging.LogRecord):
    pass


def test_it_chains_to_the_factory_before(log: _List) -> None:
    logging.setLogRecordFactory(_OtherRecord)
    install()
    logging.getLogger("kombu").info("a %s", PASSWORD)
    assert isinstance(log.records[0], _OtherRecord)
    assert log.text == "a ***\n"


@pytest.mark.parametrize("wraps", [True, False])
def test_a_factory_that_chains_to_it_is_served(
    log: _List, wraps: bool
) -> None:
    ours = logging.getLogRecordFactory()

    def chains(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = ours(*args, **kwargs)
        record.msg = f"{record.msg} {PASSWORD}"
        return record

    # A wrapper also gets the attributes of what it wraps.
    factory = functools.wraps(ours)(chains) if wraps else chains
    logging.setLogRecordFactory(factory)
    KNOWN.hold(None)
    logging.getLogger("kombu").info("a %s", PASSWORD)
    assert log.text == "a *** ***\n"


def test_a_factory_that_does_not_chain_is_chained_to(log: _List) -> None:
    logging.setLogRecordFactory(_OtherRecord)
    KNOWN.hold(None)
    logging.getLogger("kombu").info("a %s", PASSWORD)
    assert isinstance(log.records[-1], _OtherRecord)
    assert PASSWORD not in log.text


def test_a_hold_before_install_installs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(KNOWN, "on_hold", bool)
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)
    KNOWN.hold(None)
    assert logging.getLogRecordFactory() is logging.LogRecord
    logging.setLogRecordFactory(factory)


def test_records_may_be_made_from_dictionaries(log: _List) -> None:
    record = logging.makeLogRecord({"msg": "a", "name": None})
    assert record.msg == "a"


def test_warnings_are_scrubbed(log: _List) -> None:
    logging.captureWarnings(True)
    try:
        sys.modules["warnings"].showwarning(PASSWORD, UserWarning, "f", 1)
    finally:
        logging.captureWarnings(False)
    assert "UserWarning: ***" in log.text


def test_records_that_are_queued_or_pickled_are_scrubbed(log: _List) -> None:
    channel: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = handlers.QueueHandler(channel)
    socket_handler = handlers.SocketHandler("localhost", 9)
    logging.root.addHandler(handler)
    try:
        _fail(lambda: _log_failure("kombu", "a %s", PASSWORD))
    finally:
        logging.root.removeHandler(handler)
    assert PASSWORD.encode() not in pickle.dumps(channel.get())
    assert PASSWORD.encode() not in socket_handler.makePickle(log.records[0])
    assert PASSWORD not in repr(vars(copy.copy(log.records[0])))


def test_many_threads_may_log_at_once(log: _List) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.root.addHandler(handler)

    def work() -> None:
        for _ in range(50):
            with KNOWN.hold(Secret("a://u:hunter-two@h")):
                logging.getLogger("kombu").info("a %s", PASSWORD)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logging.root.removeHandler(handler)
    assert stream.getvalue() == "a ***\n" * 400


# What a formatter opens, and what is put into a record later.


def configured() -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    conf.register_opt(cfg.StrOpt("connection"), group="api_database")
    url = f"mysql+pymysql://nova:{PASSWORD}@db/nova_api"
    conf.set_override("connection", url, "api_database")
    return conf


@pytest.mark.parametrize(
    "of",
    [
        lambda conf: conf,
        lambda conf: conf.api_database,
        lambda conf: conf.api_database.items(),
        lambda conf: conf.api_database.values(),
        lambda conf: {"group": conf.api_database},
    ],
)
@pytest.mark.parametrize("formatter", [formatters.JSONFormatter(), None])
def test_what_json_opens_of_an_argument_is_hidden(
    log: _List,
    of: Callable[[cfg.ConfigOpts], object],
    formatter: logging.Formatter | None,
) -> None:
    log.setFormatter(formatter)
    log.alone()
    logging.getLogger("nova").warning("uses %s and %s", of(configured()), 1)
    logging.getLogger("nova").warning(of(configured()))
    assert len(log.records) == 2
    assert PASSWORD not in log.text
    assert "nova_api" not in log.text or "***@db/nova_api" in log.text


class Endless(collections.abc.Sequence[int]):
    """What must not be gone through."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("nobody has asked for that")


def test_what_is_not_pythons_own_container_is_not_gone_through(
    log: _List,
) -> None:
    odd = [
        collections.deque(["a"]),
        types.MappingProxyType({"a": 1}),
        {"a": 1}.keys(),
        range(2**63),
        iter(["a"]),
        Endless(),
    ]
    for one in (*odd, odd):
        logging.getLogger("nova").warning("%s and %r", one, one)
        assert log.records[-1].getMessage() == f"{one!s} and {one!r}"
    assert next(odd[4]) == "a"  # type: ignore[call-overload]  # the iterator


def test_what_holds_itself_many_times_ends(log: _List) -> None:
    many: list[object] = []
    many.extend([many] * 20)
    logging.getLogger("nova").warning("%s", many)
    assert set(log.records[-1].getMessage()) == set(str(many))


def test_what_only_json_shows_of_an_object_is_hidden(log: _List) -> None:
    class Hidden:
        def __repr__(self) -> str:
            return "<hidden>"

        def to_dict(self) -> dict[str, str]:
            return {"password": PASSWORD}

    log.setFormatter(formatters.JSONFormatter())
    log.alone()
    logging.getLogger("nova").warning("%s", Hidden())
    assert "<hidden>" in log.text
    assert PASSWORD not in log.text


def test_a_handler_that_cannot_format_shows_no_exception(
    log: _List, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the one that is being handled as well, unscrubbed."""
    log.alone()
    try:
        raise RuntimeError(PASSWORD)
    except RuntimeError:
        logging.getLogger("nova").warning("count %d", "x")
        logging.getLogger("nova").exception("count %d", "x")
    assert PASSWORD not in log.text + capsys.readouterr().err


def test_a_record_that_is_filled_in_later_is_not_withheld(
    log: _List,
) -> None:
    """As what comes from another process."""
    made = logging.makeLogRecord({"msg": "it is %s", "args": ("well",)})
    assert made.getMessage() == "it is well"
    made = logging.makeLogRecord({"msg": "it is well", "levelno": 30})
    assert made.getMessage() == "it is well"


CLEAN_RECORDS: dict[str, tuple[str, Args, int]] = {
    "texts and numbers": ("a %s (%s), %d of %.3f ms", ("b", "c", 3, 0.5), 18),
    "a dictionary": ("a %(b)s at %(c)d", ({"b": "c", "c": 3},), 21),
    "no arguments": ("a text", (), 14),
    "an access line": (
        '%s "%s %s" %d "%s"',
        ("10.20.30.40", "GET", "/v2.1/servers?a=b", 200, "http://h.org/a/"),
        21,
    ),
}


@pytest.mark.parametrize("kind", CLEAN_RECORDS)
def test_a_record_without_a_secret_takes_few_calls(
    log: _List, kind: str
) -> None:
    """Counted, because counts are the same on every machine."""
    msg, args, most = CLEAN_RECORDS[kind]
    urls = [Secret(f"rabbit://u:{'Zq9xW' * n}@h/") for n in (1, 2, 4)]
    # Passwords are looked for by three lengths of keys.
    with KNOWN.hold(*urls):
        plain, scrubbed = (
            _calls(
                functools.partial(factory, "a", 20, "f", 1, msg, args, None)
            )
            for factory in (logging.LogRecord, logging.getLogRecordFactory())
        )
    assert scrubbed - plain <= most


def _calls(way: Callable[[], object]) -> int:
    counted = 0

    def note(frame: types.FrameType, event: str, arg: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    way()
    sys.setprofile(note)
    try:
        way()
    finally:
        sys.setprofile(None)
    return counted
