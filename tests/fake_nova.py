# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""As much of Nova as the filter deals with, where Nova is not installed."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import pytest

from cellmw import redaction


class Manager:
    """Stands for oslo.db's context manager, as Nova makes it."""

    def __init__(self, url: str) -> None:
        self.url = redaction.Secret(url)
        self.disposed = 0

    def dispose_pool(self) -> None:
        self.disposed += 1

    def append_on_engine_create(self, function: Any) -> None:
        """No engine is ever made."""


class Transport:
    """What Nova makes where its cache has no pair."""

    def __init__(self, url: str) -> None:
        self.url = redaction.Secret(url)


class Nova:
    """The modules, in ``sys.modules`` as long as the test runs.

    :ivar context: ``nova.context``
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._lock = threading.Lock()
        for name in ("nova", "nova.db", "nova.db.main"):
            self._module(name)
        self.context = self._module(
            "nova.context",
            CELL_CACHE={},
            set_target_cell=self._set_target_cell,
        )
        self.database = self._module(
            "nova.db.main.api", create_context_manager=Manager
        )
        self.rpc = self._module(
            "nova.rpc", get_allowed_exmods=lambda: ["nova.exception"]
        )

    def _module(self, name: str, **content: Any) -> Any:
        module = types.ModuleType(name)
        vars(module).update(content)
        self._monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        return module

    def _set_target_cell(self, context: Any, mapping: Any) -> None:
        with self._lock:
            try:
                pair = self.context.CELL_CACHE[mapping.uuid]
            except KeyError:
                pair = (
                    Manager(mapping.database_connection),
                    Transport(mapping.transport_url),
                )
                self.context.CELL_CACHE[mapping.uuid] = pair
        context.db_connection, context.mq_connection = pair
        context.cell_uuid = mapping.uuid
