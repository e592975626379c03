# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage`` on each kind of database and of tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests import servers
from tests.functional.manage.manage import ONE, TWO, Manage, instance


def test_the_commands_work_on_each_database(
    api_database: servers.Database,
    engine: sa.Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manage = Manage(tmp_path, api_database.url, engine, capsys)
    for uuid, name in ((ONE, "one"), (TWO, "two")):
        done = manage(
            *("cell", "create", "--uuid", uuid, "--name", name),
            *("--transport-url", f"rabbit://Zuser:Zpw@{name}.example/v"),
            *("--database-connection", f"mysql://Zuser:Zpw@h/{name}"),
        )
        assert (done.status, done.err) == (0, "")
    path = tmp_path / "instances.csv"
    lines = [f"{instance(n)},{(ONE, TWO)[n % 2]},p" for n in range(50)]
    path.write_text(
        "\n".join(["instance_uuid,cell_uuid,project_id", *lines]), "utf-8"
    )
    command = ("instance", "map", "--file", str(path), "--batch-size", "20")
    assert manage(*command, "-f", "json").json["added"] == 50
    assert manage(*command, "-f", "json").json["unchanged"] == 50
    shown = manage("cell", "show", TWO, "-f", "json").json
    assert shown["instances"] == 25
    assert "25 instances are mapped" in manage.refuses("cell", "delete", TWO)
    assert "same broker" in manage.refuses(
        "cell", "update", ONE, "--transport-url", "rabbit://two.example/v"
    )
    assert manage("cell", "update", ONE, "--name", "uno").status == 0
    found = manage("route", f"/servers/{instance(2)}", "-f", "json").json
    assert found[3]["found"] == f"{ONE} (uno)"
    one = ("instance", "unmap", instance(2))
    assert manage(*one).status == 0
    assert "not mapped" in manage.refuses(*one)
    done = manage("db", "sync")
    assert (done.status, done.err) == (0, "")
    nova = sa.inspect(engine).has_table("host_mappings")
    assert ("Nova manages" in done.out) == nova
