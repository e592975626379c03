# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What has been counted reaches Prometheus, once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml
from prometheus_client.metrics_core import Metric

from cellmw import exceptions, metrics, runtime
from cellmw.cells.directory import Stats
from cellmw.durations import BOUNDS, Durations, Histogram
from cellmw.exceptions import ConfigurationError
from cellmw.metrics import page
from cellmw.metrics.definitions import Metrics
from cellmw.metrics.recorder import INTERVAL, OTHER, Recorder
from cellmw.observe import Observer
from cellmw.refusals import Refusals
from cellmw.transports.guard import Guard, Guards
from cellmw.transports.pool import CellTransports, PoolStats
from tests import servers
from tests.functional import stack

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Pool:
    cells: dict[str, CellTransports] = dataclasses.field(default_factory=dict)
    hanging: int = 0
    total: CellTransports = dataclasses.field(default_factory=CellTransports)

    def stats(self) -> PoolStats:
        return PoolStats(
            total=self.total,
            leases=0,
            hanging=self.hanging,
            cells=self.cells,
        )


@dataclasses.dataclass
class Directory:
    hits: int = 0
    misses: int = 0
    failures: int = 0
    reachable: bool = True
    durations: Durations = dataclasses.field(default_factory=Durations)
    age: float | None = None

    def stats(self) -> Stats:
        return Stats(
            cells=2,
            snapshot_age=self.age,
            reachable=self.reachable,
            instances=7,
            hits=self.hits,
            misses=self.misses,
            failures=self.failures,
            queries=0,
            queries_running=1,
            queries_queued=2,
            durations=self.durations,
        )


class Process:
    """As much of a process as is looked at."""

    def __init__(self, runtime_id: int = 1) -> None:
        self.runtime_id = runtime_id
        self.pid = os.getpid()
        self.pool = Pool()
        self.directory = Directory()
        self.workers = [1, 2, 3]
        self.refusals = Refusals()
        self.observer = Observer(lambda uuid, method: None)
        self.guards = Guards(
            lambda uuid, name: Guard(
                uuid, name, max_sends=2, breaker_failures=2, clock=lambda: 0.0
            )
        )

    def send(
        self,
        cell: str,
        name: str | None = None,
        delivered: bool | None = True,
        **details: Any,
    ) -> None:
        guard, admission = self.guards.admit(cell, name, 0)
        guard.leave()
        guard.report(delivered, admission, **details)


@dataclasses.dataclass
class Runtime:
    current: Process


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    found: list[Runtime] = []
    monkeypatch.setattr(runtime, "registry", lambda: found)
    return found


@pytest.fixture
def process(runtimes: list[Runtime]) -> Process:
    made = Process()
    runtimes.append(Runtime(made))
    return made


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def samples(found: list[Metric]) -> dict[str, float]:
    """By name and labels, as in the text, without when they were created."""
    return {
        sample.name
        + "".join(f" {k}={v}" for k, v in sorted(sample.labels.items())): (
            sample.value
        )
        for metric in found
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def shown(recorder: Recorder) -> dict[str, float]:
    recorder.record()
    return {
        name: value
        for name, value in samples(list(recorder.metrics.collect())).items()
        if value
    }


def test_messages_are_counted_by_cell(
    process: Process, recorder: Recorder
) -> None:
    for _ in range(3):
        process.send("1", "one", seconds=0.002)
    process.send("1", "one", seconds=0.2, call=True)
    process.send("1", "one", None)
    for _ in range(2):
        process.send("2", "two", False)
    with pytest.raises(Exception, match="marked down"):
        process.send("2", "two")
    for _ in range(2):
        process.guards.admit("3", "three", 0)
    with pytest.raises(Exception, match="under way"):
        process.guards.admit("3", "three", 0)
    process.guards.get("3", "three").note_stuck()
    found = shown(recorder)
    assert found["cellmw_sends_total cell=one"] == 4
    assert found["cellmw_send_failures_total cell=two"] == 2
    assert found["cellmw_cell_down cell=two"] == 1
    assert found["cellmw_cell_went_down_total cell=two"] == 1
    rejections = "cellmw_send_rejections_total cell="
    assert found[f"{rejections}two reason=down"] == 1
    assert found[f"{rejections}three reason=busy"] == 1
    assert found["cellmw_sends_under_way cell=three"] == 2
    assert found["cellmw_threads_stuck cell=three"] == 1
    took = "cellmw_send_duration_seconds"
    assert found[f"{took}_count cell=one kind=cast"] == 3
    assert found[f"{took}_sum cell=one kind=cast"] == pytest.approx(0.006)
    assert found[f"{took}_bucket cell=one kind=cast le=0.0025"] == 3
    assert f"{took}_bucket cell=one kind=cast le=0.001" not in found
    assert found[f"{took}_count cell=one kind=call"] == 1
    assert found["cellmw_worker_threads"] == 3


def test_refusals_are_counted_by_cell_and_reason(
    recorder: Recorder, process: Process
) -> None:
    for _ in range(2):
        process.refusals.note(
            exceptions.CellHasNoQueue(cell_uuid="1", cell_name="one")
        )
    process.refusals.note(exceptions.CellBusy(cell_uuid="2"))
    process.refusals.note(exceptions.LookupFailed("x"))
    for _ in range(2):
        found = shown(recorder)
        refusals = "cellmw_refusals_total cell="
        assert found[f"{refusals}one reason=cell_has_no_queue"] == 2
        assert found[f"{refusals}2 reason=cell_busy"] == 1
        assert found[f"{refusals}_none reason=lookup_failed"] == 1


def test_what_was_counted_once_is_not_counted_again(
    process: Process, recorder: Recorder
) -> None:
    process.send("1", "one", seconds=0.002)
    process.directory.hits = 5
    first = shown(recorder)
    assert shown(recorder) == first
    process.send("1", "one", seconds=0.002)
    process.directory.hits = 7
    second = shown(recorder)
    assert second["cellmw_sends_total cell=one"] == 2
    assert second["cellmw_lookups_total source=memory"] == 7
    took = "cellmw_send_duration_seconds_count cell=one kind=cast"
    assert second[took] == 2


def test_a_guard_that_begins_anew_is_counted_on(
    process: Process, recorder: Recorder
) -> None:
    for _ in range(3):
        process.send("1", "one", seconds=1.0)
    shown(recorder)
    process.guards.keep_only(())
    process.send("1", "one", seconds=2.0)
    found = shown(recorder)
    assert found["cellmw_sends_total cell=one"] == 4
    took = "cellmw_send_duration_seconds"
    assert found[f"{took}_count cell=one kind=cast"] == 4
    assert found[f"{took}_sum cell=one kind=cast"] == 5


def test_a_count_without_a_lock_that_goes_back_adds_nothing(
    process: Process, recorder: Recorder
) -> None:
    process.directory.hits = 1000
    shown(recorder)
    process.directory.hits = 998
    assert shown(recorder)["cellmw_lookups_total source=memory"] == 1000
    process.directory.hits = 1001
    assert shown(recorder)["cellmw_lookups_total source=memory"] == 1001


def test_what_is_gone_is_shown_as_nothing(
    process: Process, recorder: Recorder, runtimes: list[Runtime]
) -> None:
    for _ in range(2):
        process.send("1", "one", False)
    assert shown(recorder)["cellmw_cell_down cell=one"] == 1
    process.guards.keep_only(())
    assert "cellmw_cell_down cell=one" not in shown(recorder)
    assert shown(recorder)["cellmw_worker_threads"] == 3
    runtimes.clear()
    found = shown(recorder)
    assert "cellmw_worker_threads" not in found
    # What happened has happened.
    assert found["cellmw_send_failures_total cell=one"] == 2


def test_the_filters_of_a_process_are_counted_together(
    process: Process, recorder: Recorder, runtimes: list[Runtime]
) -> None:
    other = Process(2)
    runtimes.append(Runtime(other))
    process.send("1", "one")
    other.send("1", "one")
    other.send("1", "one")
    found = shown(recorder)
    assert found["cellmw_sends_total cell=one"] == 3
    assert found["cellmw_worker_threads"] == 6


def test_what_a_parent_left_is_not_counted(
    process: Process, recorder: Recorder
) -> None:
    process.send("1", "one")
    process.pid += 1
    assert shown(recorder) == {}


def test_transports_are_counted_by_cell(
    process: Process, recorder: Recorder
) -> None:
    process.send("1", "one")
    process.pool.hanging = 1
    process.pool.cells = {
        "1": CellTransports(
            open=1,
            leased=2,
            draining=3,
            acquired=4,
            opened=5,
            closed=6,
            failed=7,
            evicted=8,
            refused=9,
            over_limit=10,
            hung=11,
        )
    }
    found = shown(recorder)
    assert {
        name: value
        for name, value in found.items()
        if "transport" in name or "lease" in name
    } == {
        "cellmw_transports_open cell=one": 1,
        "cellmw_transports_leased cell=one": 2,
        "cellmw_transports_draining cell=one": 3,
        "cellmw_leases_total cell=one": 4,
        "cellmw_transport_opens_total cell=one": 5,
        "cellmw_transport_closes_total cell=one": 6,
        "cellmw_transport_open_failures_total cell=one": 7,
        "cellmw_transport_evictions_total cell=one": 8,
        "cellmw_transport_refusals_total cell=one": 9,
        "cellmw_transports_over_limit_total cell=one": 10,
        "cellmw_transport_closes_hung_total cell=one": 11,
        "cellmw_transport_closes_hanging": 1,
    }


def test_what_the_pool_has_forgotten_of_a_cell_is_counted(
    process: Process, recorder: Recorder
) -> None:
    """It keeps the numbers of so many cells, and of all in its total."""
    opens = "cellmw_transport_opens_total cell="

    def used(total: int, **cells: int) -> dict[str, float]:
        process.pool.total = CellTransports(opened=total)
        process.pool.cells = {
            uuid: CellTransports(opened=opened)
            for uuid, opened in cells.items()
        }
        return {
            name.removeprefix(opens): value
            for name, value in shown(recorder).items()
            if name.startswith(opens)
        }

    assert used(10, a=10) == {"a": 10}
    # Forgotten, begun anew, and seen between.
    assert used(10) == {"a": 10}
    assert used(14, a=4) == {"a": 14}
    assert used(14) == {"a": 14}
    assert used(34, a=20) == {"a": 34}
    # Begun anew, and now more than before: which cell's the others were
    # nobody knows.
    assert used(64, a=22) == {"a": 36, OTHER: 28}
    # Forgotten before anybody looked.
    assert used(70) == {"a": 36, OTHER: 34}
    assert used(70) == {"a": 36, OTHER: 34}


def test_what_each_filters_pool_has_forgotten_is_counted(
    process: Process, recorder: Recorder, runtimes: list[Runtime]
) -> None:
    other = Process(2)
    runtimes.append(Runtime(other))
    process.pool.total = CellTransports(acquired=3)
    other.pool.total = CellTransports(acquired=4, hung=1)
    for _ in range(2):
        found = shown(recorder)
        assert found[f"cellmw_leases_total cell={OTHER}"] == 7
        name = f"cellmw_transport_closes_hung_total cell={OTHER}"
        assert found[name] == 1


def test_lookups_are_counted(process: Process, recorder: Recorder) -> None:
    durations = Histogram()
    durations.observe(0.02)
    process.directory = Directory(3, 4, 1, False, durations.snapshot())
    found = shown(recorder)
    assert found["cellmw_lookups_total source=memory"] == 3
    assert found["cellmw_lookups_total source=database"] == 4
    assert found["cellmw_lookup_failures_total"] == 1
    assert found["cellmw_database_unreachable"] == 1
    assert found["cellmw_database_questions_out"] == 1
    assert found["cellmw_database_questions_waiting"] == 2
    assert found["cellmw_instances_remembered"] == 7
    took = "cellmw_database_question_duration_seconds"
    assert found[f"{took}_count"] == 1
    assert found[f"{took}_sum"] == 0.02


@pytest.mark.parametrize(
    "ages,most",
    [((12.5, 30.0, None), 30.0), ((30.0, 12.5), 30.0), ((None,), None)],
)
def test_of_the_ages_of_the_cells_the_highest_is_shown(
    runtimes: list[Runtime],
    recorder: Recorder,
    ages: tuple[float | None, ...],
    most: float | None,
) -> None:
    for number, age in enumerate(ages):
        process = Process(number)
        process.directory.age = age
        runtimes.append(Runtime(process))
    name = "cellmw_cells_age_seconds"
    assert shown(recorder).get(name) == most
    # Other processes' are not added to it either.
    assert (
        recorder.metrics["cells_age_seconds"]._multiprocess_mode == "livemax"
    )


def test_an_age_that_goes_down_is_shown(
    process: Process, recorder: Recorder
) -> None:
    for age in (30.0, 2.0):
        process.directory.age = age
        assert shown(recorder)["cellmw_cells_age_seconds"] == age


def test_durations_become_what_prometheus_would_make_of_them(
    process: Process, recorder: Recorder
) -> None:
    registry = prometheus_client.CollectorRegistry()
    plain = prometheus_client.Histogram(
        "cellmw_send_duration_seconds",
        "",
        ("cell", "kind"),
        registry=registry,
        buckets=BOUNDS,
    )
    for seconds in (0.0, *BOUNDS, *(bound * 1.1 for bound in BOUNDS)):
        plain.labels("one", "cast").observe(seconds)
        process.send("1", "one", seconds=seconds)
    wanted = samples(list(registry.collect()))
    found = shown(recorder)
    for name, value in wanted.items():
        assert found.get(name, 0) == pytest.approx(value), name


# Labels


def cells_of(found: dict[str, float]) -> set[str]:
    return {
        name.partition("cell=")[2]
        for name in found
        if name.startswith("cellmw_sends_total")
    }


def test_not_more_cells_than_allowed_have_a_label(process: Process) -> None:
    recorder = Recorder(3)
    for number in range(10):
        process.send(str(number), f"cell-{number}")
    found = shown(recorder)
    assert cells_of(found) == {"cell-0", "cell-1", "cell-2", OTHER}
    assert found[f"cellmw_sends_total cell={OTHER}"] == 7
    # Nor is there room for a name that is new.
    process.send("0", "renamed")
    found = shown(recorder)
    assert len(cells_of(found)) == 4
    assert found["cellmw_sends_total cell=cell-0"] == 1


def test_a_cell_without_a_name_goes_by_its_uuid(
    process: Process, recorder: Recorder
) -> None:
    process.send("uuid-1", None)
    process.send("uuid-2", "")
    assert cells_of(shown(recorder)) == {"uuid-1", "uuid-2"}


def test_cells_of_one_name_are_counted_together(
    process: Process, recorder: Recorder
) -> None:
    for cell in ("1", "2"):
        process.send(cell, "same")
        process.send(cell, "same", False)
        process.send(cell, "same", False)
    found = shown(recorder)
    assert found["cellmw_sends_total cell=same"] == 2
    assert found["cellmw_cell_down cell=same"] == 2


def test_a_name_shows_no_secret_and_forges_nothing(
    process: Process, recorder: Recorder
) -> None:
    process.send("1", "rabbit://user:s3cr3t-p4ssw0rd@host/")
    process.send("2", "a\nb" + "x" * 500)
    labels = cells_of(shown(recorder))
    assert not any("s3cr3t" in label for label in labels)
    assert not any("\n" in label for label in labels)
    assert max(map(len, labels)) == 100


def test_numbers_are_not_brought_up_to_date_all_the_time(
    process: Process, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(
        "cellmw.metrics.recorder.time.monotonic", lambda: now[0]
    )

    def sent() -> float:
        found = samples(list(recorder.metrics.collect()))
        return found.get("cellmw_sends_total cell=one", 0)

    process.send("1", "one")
    recorder.record_now_and_then()
    assert sent() == 1
    process.send("1", "one")
    now[0] += INTERVAL - 0.1
    recorder.record_now_and_then()
    assert sent() == 1
    now[0] += 0.2
    recorder.record_now_and_then()
    assert sent() == 2


# The page


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been counted in this process."""
    monkeypatch.setattr(page, "_here", page._Here())
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


def test_the_page_shows_the_process_and_says_so(
    here: None, process: Process
) -> None:
    application = metrics.app_factory({"other": "default"})
    process.send("1", "one")
    response = stack.request(application, "/")
    assert response.status_int == 200
    assert response.content_type == "text/plain"
    first, *lines = response.text.splitlines()
    assert first == (
        f"# Process {os.getpid()} alone: PROMETHEUS_MULTIPROC_DIR is not set."
    )
    assert 'cellmw_sends_total{cell="one"} 1.0' in lines
    process.send("1", "one")
    other = stack.request(metrics.app_factory({}), "/").text
    assert 'cellmw_sends_total{cell="one"} 2.0' in other.splitlines()


def test_a_directory_that_is_set_too_late_is_told(
    here: None, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/somewhere")
    text = stack.request(metrics.app_factory({}), "/").text
    assert "was set after prometheus_client" in text.splitlines()[0]


def test_the_page_is_read_only(here: None, process: Process) -> None:
    application = metrics.app_factory({})
    head = stack.request(application, "/", "HEAD")
    assert (head.status_int, head.body) == (200, b"")
    assert int(head.headers["Content-Length"]) > 1000
    refused = stack.request(application, "/", "POST")
    assert refused.status_int == 405
    assert refused.headers["Allow"] == "GET, HEAD"


def test_the_page_takes_a_bound_on_labels(
    here: None, process: Process
) -> None:
    application = metrics.app_factory({}, max_cells="1")
    process.send("1", "one")
    process.send("2", "two")
    text = stack.request(application, "/").text
    assert f'cellmw_sends_total{{cell="{OTHER}"}} 1.0' in text


@pytest.mark.parametrize("value", ["0", "-1", "many", "", "1.5"])
def test_a_bad_bound_is_refused(here: None, value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"max_cells.*1 or more"):
        metrics.app_factory({}, max_cells=value)


def test_an_unknown_option_is_refused(here: None) -> None:
    with pytest.raises(ConfigurationError, match=r"'max_cell'.*max_cells"):
        metrics.app_factory({}, max_cell="3")


def test_a_service_can_show_them_on_its_own_page(
    here: None, process: Process
) -> None:
    registry = prometheus_client.CollectorRegistry()
    process.send("1", "one")
    metrics.install(registry)
    metrics.install(registry)
    text = prometheus_client.generate_latest(registry).decode()
    assert text.count('cellmw_sends_total{cell="one"} 1.0') == 1


# The dashboard


def names_of_series() -> set[str]:
    suffixes = {
        "counter": ("_total",),
        "gauge": ("",),
        "histogram": ("_bucket", "_sum", "_count"),
    }
    return {
        metric.name + suffix
        for metric in Metrics().collect()
        for suffix in suffixes[metric.type]
    }


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    path = ROOT / "doc/source/_static/grafana-dashboard.json"
    dashboard = json.loads(path.read_text("utf-8"))
    queries = [
        target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ] + [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    assert len(queries) > 20
    series = names_of_series()
    asked = set()
    for query in queries:
        found = set(re.findall(r"\bcellmw_\w+", query))
        assert found, query
        assert found <= series, query
        asked |= found
    # And shows all of them, if not each part of a histogram.
    unseen = {
        name
        for name in series - asked
        if not name.endswith(("_sum", "_count"))
    }
    assert not unseen


def test_every_metric_is_told_of_in_the_documentation() -> None:
    text = (ROOT / "doc/source/how-to/monitor.rst").read_text("utf-8")
    for name in names_of_series():
        base = re.sub(r"_(bucket|sum|count)\Z", "", name)
        assert base in text, base


# The rules for Prometheus

RULES = ROOT / "doc/source/_static/prometheus-rules.yaml"


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def reasons_of(base: type) -> set[str]:
    return {
        re.sub(r"(?<!^)(?=[A-Z])", "_", one.__name__).lower()
        for one in vars(exceptions).values()
        if isinstance(one, type) and issubclass(one, base)
    }


def test_the_rules_ask_for_metrics_and_reasons_that_there_are() -> None:
    series = names_of_series()
    reasons = {"busy", "down"} | reasons_of(exceptions.CellMWError)
    for alert in alerts():
        found = set(re.findall(r"\bcellmw_\w+", alert["expr"]))
        assert found
        assert found <= series, alert["alert"]
        for asked in re.findall(r'reason=~?"([^"]+)"', alert["expr"]):
            assert set(asked.split("|")) <= reasons, alert["alert"]


def test_each_alert_has_a_section_on_what_to_do() -> None:
    text = (ROOT / "doc/source/how-to/incident.rst").read_text("utf-8")
    titles = set(re.findall(r"^(Cellmw\w+)\n=+$", text, re.MULTILINE))
    assert titles == {alert["alert"] for alert in alerts()}
    rows = re.findall(r"^      \* - (``.*)$", text, re.MULTILINE)
    told = set(re.findall(r"``(\w+)``", " ".join(rows)))
    assert told - {"lookup_failed"} == reasons_of(exceptions.SendError) - {
        "send_error"
    }


def test_each_alert_fires_on_what_it_is_about(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        servers.missing(
            "promtool is not installed",
            "on Debian: apt-get install prometheus",
        )
    source = Path(__file__).with_name("prometheus_rules_test.yaml")
    file = tmp_path / "test.yaml"
    text = source.read_text("utf-8").replace("RULES", str(RULES))
    file.write_text(text, "utf-8")
    for command in (("check", "rules", str(RULES)), ("test", "rules", file)):
        done = subprocess.run(
            [promtool, *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
