# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""WSGI servers, as their documentation says they are started.

The settings here are those that the documentation tells operators to copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from tests import servers

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.wsgi_servers.service"
_SEARCH_PATH = f"{ROOT}:{sysconfig.get_paths()['purelib']}"
_APACHE_MODULES = Path("/usr/lib/apache2/modules")
# Apache refuses to serve as root.  Its user may read the checkout anyway.
_CAPABILITIES = "+dac_override,+dac_read_search"
_NOT_AS_ROOT = (
    *("setpriv", "--reuid=www-data", "--regid=www-data", "--clear-groups"),
    *("--inh-caps", _CAPABILITIES, "--ambient-caps", _CAPABILITIES),
)
_PYTHON = (sys.executable, "-W", "ignore")


@dataclasses.dataclass(frozen=True)
class Server:
    """One server with one set of settings.

    :ivar name: as it stands in the documentation
    :ivar needs: the Python package that it is in; empty for Apache
    :ivar command: its arguments; ``{port}`` and ``{folder}`` are filled in
    :ivar reload: the signal that replaces the workers gracefully
    :ivar reload_has_gap: whether it answers 503 itself, for a moment, until
        there are new workers
    :ivar keeps_alive: whether a connection serves several requests
    :ivar ends_requests: whether SIGTERM lets requests under way end
    :ivar recycles: whether workers are replaced after some requests
    :ivar validates: whether wsgiref.validate stands on both sides of the
        filter
    :ivar apache: what its configuration says besides
    """

    name: str
    needs: str
    command: tuple[str, ...]
    reload: signal.Signals | None = None
    reload_has_gap: bool = False
    keeps_alive: bool = True
    ends_requests: bool = True
    recycles: bool = False
    validates: bool = False
    apache: str = ""

    def __str__(self) -> str:
        return self.name


def _gunicorn(
    name: str, *args: str, keeps_alive: bool = True, recycles: bool = False
) -> Server:
    return Server(
        name,
        "gunicorn",
        (
            *_PYTHON,
            *("-m", "gunicorn", "--bind", "127.0.0.1:{port}"),
            *("--workers", "2", "--log-level", "warning"),
            *args,
            f"{MODULE}:application",
        ),
        reload=signal.SIGHUP,
        keeps_alive=keeps_alive,
        recycles=recycles,
    )


def _uwsgi(name: str, *args: str) -> Server:
    return Server(
        name,
        "pyuwsgi",
        (
            *(sys.executable, "-c", "import pyuwsgi; pyuwsgi.run()"),
            *("--http-socket", "127.0.0.1:{port}", "--module", MODULE),
            *("--master", "--processes", "2", "--threads", "4"),
            *("--enable-threads", "--die-on-term", "--need-app"),
            *("--disable-logging", "--worker-reload-mercy", "20"),
            *args,
        ),
        reload=signal.SIGHUP,
        keeps_alive=False,
        ends_requests=False,
    )


def _script(
    name: str, code: str, *, keeps_alive: bool = True, validates: bool = False
) -> Server:
    return Server(
        name,
        name,
        (*_PYTHON, "-c", textwrap.dedent(code), "{port}"),
        keeps_alive=keeps_alive,
        ends_requests=False,
        validates=validates,
    )


SERVERS = (
    _gunicorn("gunicorn-sync", keeps_alive=False),
    _gunicorn(
        "gunicorn-gthread", "--worker-class", "gthread", "--threads", "4"
    ),
    _gunicorn(
        "gunicorn-preload",
        *("--preload", "--worker-class", "gthread", "--threads", "4"),
    ),
    _gunicorn(
        "gunicorn-recycling",
        *("--worker-class", "gthread", "--threads", "4"),
        *("--max-requests", "300", "--max-requests-jitter", "50"),
        recycles=True,
    ),
    _uwsgi("uwsgi-preforking"),
    _uwsgi("uwsgi-fork-hooks", "--py-call-uwsgi-fork-hooks"),
    _uwsgi("uwsgi-lazy-apps", "--lazy-apps"),
    _script(
        "waitress",
        f"""
        import sys
        import waitress
        from {MODULE} import application
        waitress.serve(application, host="127.0.0.1", port=int(sys.argv[1]))
        """,
    ),
    _script(
        "cheroot",
        f"""
        import signal
        import sys
        from cheroot import wsgi
        from {MODULE} import application
        server = wsgi.Server(("127.0.0.1", int(sys.argv[1])), application)

        def end(*args):
            raise SystemExit

        signal.signal(signal.SIGTERM, end)
        try:
            server.start()
        finally:
            server.stop()
        """,
    ),
    _script(
        "wsgiref",
        f"""
        import socketserver
        import sys
        from wsgiref import simple_server
        from {MODULE} import application

        class Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
            daemon_threads = True
            request_queue_size = 64

        class Handler(simple_server.WSGIRequestHandler):
            def log_message(self, *args):
                pass

        simple_server.make_server(
            "127.0.0.1", int(sys.argv[1]), application, Server, Handler
        ).serve_forever()
        """,
        keeps_alive=False,
        validates=True,
    ),
    Server(
        "mod_wsgi-daemon",
        "",
        ("apache2", "-f", "{folder}/apache.conf", "-DFOREGROUND"),
        reload=signal.SIGUSR1,
        reload_has_gap=True,
        ends_requests=False,
        apache=(
            "WSGIDaemonProcess api processes=2 threads=4 "
            "home={sockets} python-path={path}\nWSGIProcessGroup api\n"
            "WSGISocketPrefix {sockets}/wsgi\n"
        ),
    ),
    Server(
        "mod_wsgi-embedded",
        "",
        ("apache2", "-f", "{folder}/apache.conf", "-DFOREGROUND"),
        reload=signal.SIGUSR1,
        ends_requests=False,
        apache="WSGIPythonPath {path}\n",
    ),
)

_APACHE = """
ServerRoot {folder}
ServerName localhost
PidFile {folder}/apache.pid
DefaultRuntimeDir {folder}
Listen 127.0.0.1:{port}
ErrorLog {folder}/server.log
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule wsgi_module {modules}/mod_wsgi.so
StartServers 2
ServerLimit 2
ThreadsPerChild 4
MaxRequestWorkers 8
MinSpareThreads 1
MaxSpareThreads 8
{apache}
WSGIPythonHome /usr
WSGIApplicationGroup %{{GLOBAL}}
WSGIScriptAlias / {folder}/service.wsgi
<Directory {folder}>
Require all granted
</Directory>
"""


class Running:
    """A server that runs until :meth:`stop`."""

    def __init__(
        self,
        server: Server,
        folder: Path,
        paste: Path,
        config: Path,
        sockets: Path,
    ) -> None:
        self.server = server
        self.port = servers.free_port()
        self.log = folder / "server.log"
        self._environment = {
            **os.environ,
            **({"SERVICE_VALIDATE": "1"} if server.validates else {}),
            # uWSGI's reload starts the interpreter of the virtual
            # environment's base; Apache has one of its own.
            "PYTHONPATH": _SEARCH_PATH,
            "SERVICE_PASTE_FILE": str(paste),
            "SERVICE_CONFIG_FILE": str(config),
        }
        if not server.needs:
            self._configure_apache(folder, sockets)
        command = [
            part.replace("{port}", str(self.port)).replace(
                "{folder}", str(folder)
            )
            for part in server.command
        ]
        if not server.needs and os.geteuid() == 0:
            command = [*_NOT_AS_ROOT, *command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _configure_apache(self, folder: Path, sockets: Path) -> None:
        (folder / "apache.conf").write_text(
            _APACHE.format(
                folder=folder,
                port=self.port,
                modules=_APACHE_MODULES,
                apache=self.server.apache.format(
                    path=_SEARCH_PATH, sockets=sockets
                ),
            ),
            "utf-8",
        )
        names = ("SERVICE_PASTE_FILE", "SERVICE_CONFIG_FILE")
        lines = [
            f"os.environ[{n!r}] = {self._environment[n]!r}" for n in names
        ]
        code = (
            "import os, warnings",
            "warnings.simplefilter('ignore')",
            *lines,
            f"from {MODULE} import application",
            "",
        )
        (folder / "service.wsgi").write_text("\n".join(code), "utf-8")

    def wait_until_up(self, timeout: float = 60.0) -> None:
        """Wait until the port answers."""
        deadline = time.monotonic() + timeout
        while not servers.answers("127.0.0.1", self.port):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def output(self) -> str:
        """What the server has written so far."""
        return self.log.read_text("utf-8", "replace")[-4000:]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server's first process."""
        self.process.send_signal(number)

    def stop(self, timeout: float = 30.0) -> None:
        """End it with SIGTERM; kill what is left."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(
    server: Server, folder: Path, paste: Path, config: Path
) -> Iterator[Running]:
    """Start a server; stop it at the end."""
    _require(server)
    with tempfile.TemporaryDirectory(prefix="cellmw-") as sockets:
        # Apache runs as another user.
        Path(sockets).chmod(0o777)
        started = Running(server, folder, paste, config, Path(sockets))
        try:
            started.wait_until_up()
            yield started
        finally:
            started.stop()


def _require(server: Server) -> None:
    if server.needs:
        if importlib.util.find_spec(server.needs) is None:
            servers.missing(
                f"{server.needs} is not installed",
                "pip install 'cellmw[test]'",
            )
    elif not (shutil.which("apache2") and any(_wsgi_modules())):
        servers.missing(
            "there is no Apache with mod_wsgi for this Python",
            "on Debian: apt-get install apache2 libapache2-mod-wsgi-py3",
        )


def _wsgi_modules() -> Iterator[Path]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    yield from _APACHE_MODULES.glob(f"mod_wsgi.so-{version}")
