# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The pool beside a model of it, under whatever hypothesis thinks of.

The model is what the contract says, in one thread: which transport a lease
gets, which are open, and which are closed by now.  With ``--full`` it is run
ten thousand times.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from cellmw import exceptions
from cellmw.cells.mapping import Generation
from cellmw.transports.pool import Lease
from tests.fakes import Gate, Rig, Transport, cell_uuid, generation

IDLE = 600.0
# With the chance that a rig has, of one half.
LIFETIME = 3600.0
LIVES = LIFETIME * 0.95

CELLS = st.integers(1, 5)
STATES = st.integers(0, 1)


@dataclasses.dataclass(eq=False)
class Model:
    """What is expected of one transport."""

    generation: Generation
    transport: Transport
    used: float
    expires: float
    leases: int = 1
    cached: bool = True

    @property
    def ended(self) -> bool:
        return not self.cached and not self.leases


class Machine(stateful.RuleBasedStateMachine):
    leases = stateful.Bundle("leases")

    @stateful.initialize(size=st.sampled_from([0, 1, 3]), refuse=st.booleans())
    def begin(self, size: int, refuse: bool) -> None:
        self.size = size
        self.refuse = refuse
        self.left: list[tuple[Rig, list[Lease], list[Model]]] = []
        self.start_anew()

    def start_anew(self) -> None:
        self.rig = Rig(
            max_size=self.size,
            refuse_over_limit=self.refuse,
            idle_timeout=IDLE,
            max_lifetime=LIFETIME,
        )
        self.rig.__enter__()
        self.models: list[Model] = []
        self.held: list[tuple[Lease, Model]] = []
        self.current: dict[str, Generation] | None = None
        self.closed = False
        self.gate: Gate | None = None

    # What the model says.

    def cached(self) -> list[Model]:
        return [model for model in self.models if model.cached]

    def find(self, of: Generation) -> Model | None:
        for model in self.cached():
            if model.generation is of:
                return model
        return None

    def outdated(self, of: Generation) -> bool:
        if self.current is None:
            return False
        return self.current.get(of.cell_uuid) is not of

    def refusal(self, of: Generation) -> type[Exception] | None:
        """Why a generation that is not cached is not opened."""
        if self.closed:
            return exceptions.ShuttingDown
        if self.size == 0 or self.outdated(of):
            return None
        if len(self.cached()) < self.size or not self.refuse:
            return None
        if any(not model.leases for model in self.cached()):
            return None
        return exceptions.CellBusy

    def make_room(self, of: Generation) -> bool:
        """Whether a new one is cached; evicts for it where it must."""
        if self.size == 0 or self.outdated(of):
            return False
        if len(self.cached()) < self.size:
            return True
        unused = [model for model in self.cached() if not model.leases]
        if not unused:
            return False
        min(unused, key=lambda model: model.used).cached = False
        return True

    # What is done.

    @stateful.rule(target=leases, cell=CELLS, state=STATES)
    def acquire(self, cell: int, state: int) -> Any:
        of = generation(cell, state)
        found = self.find(of)
        refusal = None if found else self.refusal(of)
        if refusal is not None:
            with pytest.raises(refusal):
                self.rig.acquire(cell, state)
            return stateful.multiple()
        before = len(self.rig.transports.opened)
        cached = found is None and self.make_room(of)
        lease = self.rig.acquire(cell, state)
        transport: Any = lease.transport
        assert transport.generation is of
        if found is not None:
            assert transport is found.transport
            found.leases += 1
            model = found
        else:
            assert len(self.rig.transports.opened) == before + 1
            assert transport.one_request is not cached
            now = self.rig.clock.now
            model = Model(of, transport, now, now + LIVES, cached=cached)
            self.models.append(model)
        self.held.append((lease, model))
        return lease

    @stateful.rule(cell=CELLS, state=STATES)
    def fail_to_open(self, cell: int, state: int) -> None:
        of = generation(cell, state)
        if self.find(of) is not None or self.refusal(of) is not None:
            return

        def fail(_: Generation) -> None:
            raise OSError("cannot open")

        # The place is made before it is opened, and that is not undone.
        self.make_room(of)
        self.rig.transports.on_open = fail
        with pytest.raises(exceptions.CellUnavailable):
            self.rig.acquire(cell, state)
        self.rig.transports.on_open = lambda _: None

    def model_of(self, lease: Lease) -> Model | None:
        for held, model in self.held:
            if held is lease:
                return model
        return None

    @stateful.rule(target=leases, lease=leases)
    def share(self, lease: Lease) -> Any:
        model = self.model_of(lease)
        if model is None:
            return stateful.multiple()
        other = lease.share()
        model.leases += 1
        self.held.append((other, model))
        return other

    @stateful.rule(lease=leases)
    def send(self, lease: Lease) -> None:
        model = self.model_of(lease)
        if model is not None:
            assert lease.transport is not None
            with model.transport.use():
                assert lease.transport is model.transport

    @stateful.rule(lease=leases)
    def release(self, lease: Lease) -> None:
        """Also one that was released before, or is the parent's."""
        model = self.model_of(lease)
        lease.release()
        if model is not None:
            self.held = [pair for pair in self.held if pair[0] is not lease]
            model.leases -= 1
            model.used = self.rig.clock.now

    @stateful.rule(lease=leases)
    def give_up(self, lease: Lease) -> None:
        model = self.model_of(lease)
        lease.give_up()
        if model is not None:
            model.cached = False

    @stateful.rule(
        current=st.dictionaries(CELLS, STATES, min_size=1, max_size=5)
    )
    def rotate(self, current: dict[int, int]) -> None:
        self.current = {
            cell_uuid(cell): generation(cell, state)
            for cell, state in current.items()
        }
        self.rig.pool.keep_only(self.current)
        for model in self.cached():
            if self.outdated(model.generation):
                model.cached = False

    @stateful.rule(jump=st.sampled_from([1, 299, 600, 1800, 3600, -1, -3600]))
    def jump(self, jump: int) -> None:
        self.rig.clock.now += jump

    @stateful.rule()
    def sweep(self) -> None:
        self.rig.pool.sweep()
        now = self.rig.clock.now
        for model in self.cached():
            model.used = min(model.used, now)
            model.expires = min(model.expires, now + LIFETIME)
            idle = not model.leases and now - model.used >= IDLE
            if idle or now >= model.expires:
                model.cached = False

    @stateful.rule()
    def let_closing_hang(self) -> None:
        if self.gate is None:
            self.gate = Gate()
            self.rig.transports.on_close = self.gate.wait

    @stateful.rule()
    def let_closing_end(self) -> None:
        if self.gate is not None:
            self.gate.open()
            self.gate = None
            self.rig.transports.on_close = lambda one: None

    @stateful.rule()
    def shut_down(self) -> None:
        for model in self.cached():
            model.cached = False
        self.closed = True
        left = sum(not model.ended for model in self.models)
        assert self.rig.pool.close(0) == left

    @stateful.rule()
    def fork(self) -> None:
        """The child has a pool of its own; its parent's is not touched."""
        self.let_closing_end()
        self.check()
        # For all that the old one can tell, this is another process.
        self.rig.pool._pid += 1
        self.left.append((self.rig, [h for h, _ in self.held], self.models))
        self.start_anew()

    # What always holds.

    @stateful.invariant()
    def check(self) -> None:
        rig = self.rig
        open_now = [model for model in self.models if not model.ended]
        stats = rig.stats
        assert not rig.transports.violations
        assert stats.leases == sum(model.leases for model in self.models)
        assert stats.total.open == len(open_now)
        assert stats.total.opened == len(self.models)
        assert stats.total.leased == sum(m.leases > 0 for m in open_now)
        assert stats.total.draining == sum(not m.cached for m in open_now)
        assert len(self.cached()) <= self.size
        assert set(rig.pool._entries) == {m.generation for m in self.cached()}
        if self.gate is None:
            rig.settle()
            for model in self.models:
                assert model.transport.closed == int(model.ended)

    def teardown(self) -> None:
        if not hasattr(self, "left"):
            return
        self.let_closing_end()
        leases = [lease for lease, _ in self.held]
        self.left.append((self.rig, leases, self.models))
        for rig, held, models in self.left:
            if rig is not self.rig:
                # As the parent left it.
                rig.pool._pid -= 1
                assert rig.stats.leases == sum(m.leases for m in models)
            for lease in held:
                lease.release()
            rig.__exit__(None, None, None)


def _run(examples: int) -> None:
    stateful.run_state_machine_as_test(
        Machine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param(60, id="short"),
        pytest.param(
            10_000,
            id="full",
            marks=[pytest.mark.full, pytest.mark.timeout(7200)],
        ),
    ],
)
def test_the_pool_is_what_the_model_says(examples: int) -> None:
    _run(examples)
