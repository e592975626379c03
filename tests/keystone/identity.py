# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Keystone on SQLite with fernet tokens, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
from keystoneauth1 import session as ksa_session
from keystoneauth1.identity import v3

from tests import servers

ADMIN_PASSWORD = "Zpassword-of-admin"
_CONFIGURATION = """
[database]
connection = sqlite:///{folder}/keystone.sqlite
[fernet_tokens]
key_repository = {folder}/fernet
[fernet_receipts]
key_repository = {folder}/fernet
[credential]
key_repository = {folder}/credential
[token]
provider = fernet
expiration = {expiration}
# So that a token that was revoked is known to be at once.
[cache]
enabled = false
"""
# Keystone takes the arguments of the program for its own.
_SERVE = """
import sys
port = sys.argv.pop()
import waitress
from keystone.wsgi.api import application
waitress.serve(application, listen=f"127.0.0.1:{port}")
"""


class Keystone:
    """The service, with the administrator that its bootstrap makes.

    :ivar url: of its version 3
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        port = servers.free_port()
        self.url = f"http://127.0.0.1:{port}/v3"
        for name in ("fernet", "credential"):
            (folder / name).mkdir(mode=0o700)
        self._file = self._configure(folder, expiration=3600)
        self._manage("db_sync")
        owner = ("--keystone-user", str(os.getuid()))
        group = ("--keystone-group", str(os.getgid()))
        self._manage("fernet_setup", *owner, *group)
        self._manage("credential_setup", *owner, *group)
        self._manage(
            *("bootstrap", "--bootstrap-password", ADMIN_PASSWORD),
            *("--bootstrap-public-url", self.url),
            # What authtoken asks for.
            *("--bootstrap-internal-url", self.url),
            *("--bootstrap-region-id", "0" * 32),
        )
        self._process = self._serve(port, folder)

    def _configure(self, folder: Path, *, expiration: int) -> Path:
        file = folder / "keystone.conf"
        text = _CONFIGURATION.format(
            folder=self._folder, expiration=expiration
        )
        file.write_text(text, "utf-8")
        return file

    def _manage(self, *arguments: str) -> None:
        command = Path(sys.executable).with_name("keystone-manage")
        subprocess.run(
            [command, "--config-file", self._file, *arguments],
            capture_output=True,
            check=True,
            timeout=120,
        )

    def _serve(self, port: int, folder: Path) -> subprocess.Popen[bytes]:
        output_file = folder / "output"
        with output_file.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-W", "ignore", "-c", _SERVE),
                    str(port),
                ],
                env={
                    **os.environ,
                    "OS_KEYSTONE_CONFIG_DIR": str(folder),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + 60
        while not servers.answers("127.0.0.1", port):
            assert process.poll() is None, output_file.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)  # another process: nothing tells when it listens
        return process

    def login(self, **options: Any) -> v3.Password:
        """How the administrator logs in."""
        return v3.Password(
            **{
                "auth_url": self.url,
                "username": "admin",
                "password": ADMIN_PASSWORD,
                "project_name": "admin",
                "user_domain_id": "default",
                "project_domain_id": "default",
                **options,
            }
        )

    def session(self, **options: Any) -> ksa_session.Session:
        """A session of the administrator."""
        return ksa_session.Session(auth=self.login(), **options)

    def token(self) -> str:
        """A new token of the administrator."""
        token = self.session().get_token()
        assert token is not None
        return str(token)

    def revoke(self, token: str) -> None:
        """Let a token be good no longer."""
        requests.delete(
            f"{self.url}/auth/tokens",
            headers={"X-Auth-Token": self.token(), "X-Subject-Token": token},
            timeout=30,
        ).raise_for_status()

    def expired_token(self) -> str:
        """A token of the administrator whose time is over.

        Another Keystone with the same keys and tables makes one that is good
        for a second: how long it is good stands in the token.
        """
        folder = self._folder / "short"
        folder.mkdir()
        self._configure(folder, expiration=1)
        port = servers.free_port()
        process = self._serve(port, folder)
        try:
            login = self.login(auth_url=f"http://127.0.0.1:{port}/v3")
            token = str(login.get_access(ksa_session.Session()).auth_token)
        finally:
            process.terminate()
            process.wait(30)
        headers = {"X-Auth-Token": self.token(), "X-Subject-Token": token}
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = requests.get(
                f"{self.url}/auth/tokens", headers=headers, timeout=30
            )
            if found.status_code == 404:
                return token
            time.sleep(0.2)  # it expires by the clock of Keystone's process
        raise AssertionError("the token does not expire")

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(30)
