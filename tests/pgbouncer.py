# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A PgBouncer of a test's own before the shared PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from tests import servers

_START_WITHIN = 30.0


@contextlib.contextmanager
def pgbouncer(database: servers.Database, *, sessions: int) -> Iterator[str]:
    """The ``host:port`` of a PgBouncer that pools transactions.

    All but who may connect to what is its default configuration.

    :param sessions: how many it has with the server, at most
    """
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        servers.missing(
            "there is no PgBouncer",
            "install it (on Debian: apt-get install pgbouncer)",
        )
    user = sa.make_url(database.url).username or "root"
    host, port = database.address
    own_port = servers.free_port()
    with tempfile.TemporaryDirectory(prefix="cellmw-pgbouncer-") as name:
        folder = Path(name)
        (folder / "users").write_text(f'"{user}" ""\n', "utf-8")
        (folder / "ini").write_text(
            f"[databases]\n* = host={host} port={port} user={user}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {own_port}\n"
            "unix_socket_dir =\nauth_type = trust\n"
            f"auth_file = {folder / 'users'}\n"
            f"pool_mode = transaction\ndefault_pool_size = {sessions}\n",
            "utf-8",
        )
        folder.chmod(0o755)
        # It does not run for root.
        account = "nobody" if os.geteuid() == 0 else None
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, str(folder / "ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=account,
                cwd="/",
            )
        try:
            end = time.monotonic() + _START_WITHIN
            while not servers.answers("127.0.0.1", own_port):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.05)
            yield f"127.0.0.1:{own_port}"
        finally:
            process.kill()
            process.wait()
