# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A message queue for each cell, and one for the service itself.

In memory, or a virtual host each on a RabbitMQ that is there already.
:class:`RabbitMQ` owns the virtual hosts that it makes, and no other.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from urllib import parse

from cellmw import redaction, testing
from cellmw.demo.errors import DemoError
from cellmw.demo.threads import at_once

_MANAGEMENT_PORT = 15672
_TIMEOUT = 60.0
_EVERYTHING = {"configure": ".*", "write": ".*", "read": ".*"}


class Brokers(Protocol):
    """Where the queues are.

    :ivar kind: what to tell of them
    """

    kind: str

    def create(self, names: Iterable[str]) -> dict[str, str]:
        """Make a queue for each name; gives their transport URLs.

        :raises DemoError: it cannot be done
        """
        ...

    def remove(self) -> None:
        """Remove what was made."""
        ...


class Memory:
    """Message brokers in this process."""

    kind = "message brokers in memory"

    def create(self, names: Iterable[str]) -> dict[str, str]:
        """Nothing is to be made: naming a broker is enough."""
        return {name: f"cellmw-memory://localhost/{name}" for name in names}

    def remove(self) -> None:
        """Forget the brokers."""
        testing.forget_brokers()


class RabbitMQ:
    """Virtual hosts on a RabbitMQ, made and removed by whatever way works.

    That is ``rabbitmqctl``, if the broker is on this machine, else the
    management API of the broker.

    :param url: a transport URL; its virtual host is not used
    :param command: what stands for ``rabbitmqctl``; None: ``rabbitmqctl``,
        for a broker on this machine
    """

    def __init__(self, url: str, command: str | None = None) -> None:
        parts = parse.urlsplit(url)
        if parts.scheme.partition("+")[0] not in ("rabbit", "kombu"):
            raise DemoError("--rabbit takes a URL like rabbit://host:5672/")
        self._parts = parts
        # Of a cluster, the first host speaks for all.
        login, _, address = parts.netloc.rpartition("@")
        first = parse.urlsplit(f"//{address.partition(',')[0]}")
        self._host = first.hostname or "localhost"
        self._port = first.port or 5672
        user, _, password = login.rpartition(",")[2].partition(":")
        self._user = parse.unquote(user) or "guest"
        self._password = parse.unquote(password) or "guest"
        self._command = command
        self._prefix = f"cellmw-demo-{os.getpid()}-{secrets.token_hex(3)}"
        self._vhosts: list[str] = []
        self._delete: Callable[[str], None] | None = None
        self.kind = f"RabbitMQ at {self._host}:{self._port}"

    def create(self, names: Iterable[str]) -> dict[str, str]:
        """Make a virtual host for each name."""
        names = list(names)
        self._check_reachable()
        self._vhosts = [f"{self._prefix}-{name}" for name in names]
        problems = []
        for create, delete in (
            (self._create_by_command, self._delete_by_command),
            (self._create_by_api, self._delete_by_api),
        ):
            # Known from before, so that what is interrupted is removed too.
            self._delete = delete
            try:
                create(self._vhosts)
            except (DemoError, OSError, http.client.HTTPException) as error:
                problems.append(redaction.scrub(f"{error}"))
                continue
            return {
                name: self._url(vhost)
                for name, vhost in zip(names, self._vhosts, strict=True)
            }
        self._vhosts = []
        raise DemoError(
            f"no virtual hosts could be made on {self.kind}: "
            f"{'; '.join(problems)}. Run this as a user who may call "
            "rabbitmqctl, name the command with --rabbitmqctl, or let "
            "rabbitmq-plugins enable rabbitmq_management"
        )

    def remove(self) -> None:
        """Remove the virtual hosts, with all that is in them."""
        vhosts, self._vhosts = self._vhosts, []
        if self._delete is not None:
            at_once(self._delete, vhosts)

    def _check_reachable(self) -> None:
        try:
            socket.create_connection((self._host, self._port), 5).close()
        except OSError as error:
            raise DemoError(
                f"no broker answers at {self._host}:{self._port}: {error}"
            ) from None

    def _url(self, vhost: str) -> str:
        return self._parts._replace(path=f"/{vhost}").geturl()

    # rabbitmqctl

    def _create_by_command(self, vhosts: list[str]) -> None:
        # All in one call, for each starts an Erlang machine.
        permissions = [
            {"vhost": vhost, "user": self._user, **_EVERYTHING}
            for vhost in vhosts
        ]
        named = [{"name": vhost} for vhost in vhosts]
        definitions = {"vhosts": named, "permissions": permissions}
        self._run("import_definitions", given=json.dumps(definitions))

    def _delete_by_command(self, vhost: str) -> None:
        self._run("delete_vhost", vhost)

    def _run(self, *arguments: str, given: str = "") -> None:
        command = shlex.split(self._command or "rabbitmqctl")
        if self._command is None and not _is_here(self._host):
            raise DemoError("rabbitmqctl is for a broker on this machine")
        if shutil.which(command[0]) is None:
            raise DemoError(f"there is no command {command[0]}")
        done = subprocess.run(  # noqa: S603  # the user's own command
            [*command, "-q", *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            # Ctrl-C is ours alone; a command that has begun is carried out.
            start_new_session=True,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise DemoError(
                f"{command[0]} {arguments[0]}: "
                f"{said[0] if said else f'status {done.returncode}'}"
            )

    # The management plugin's HTTP API

    def _create_by_api(self, vhosts: list[str]) -> None:
        user = _quote(self._user)
        for vhost in map(_quote, vhosts):
            self._ask("PUT", f"/api/vhosts/{vhost}", {})
            path = f"/api/permissions/{vhost}/{user}"
            self._ask("PUT", path, _EVERYTHING)

    def _delete_by_api(self, vhost: str) -> None:
        self._ask("DELETE", f"/api/vhosts/{_quote(vhost)}", None)

    def _ask(self, method: str, path: str, body: Any) -> None:
        login = base64.b64encode(f"{self._user}:{self._password}".encode())
        connection = http.client.HTTPConnection(
            self._host, _MANAGEMENT_PORT, timeout=10
        )
        try:
            connection.request(
                method,
                path,
                None if body is None else json.dumps(body),
                {
                    "Authorization": f"Basic {login.decode()}",
                    "Content-Type": "application/json",
                },
            )
            status = connection.getresponse().status
        except OSError as error:
            raise DemoError(f"the management API: {error}") from None
        finally:
            connection.close()
        if status >= 300:
            raise DemoError(f"the management API answered {status}")


def _quote(text: str) -> str:
    return parse.quote(text, safe="")


def _is_here(host: str) -> bool:
    names = {"localhost", "127.0.0.1", "::1", socket.gethostname()}
    return host in names
