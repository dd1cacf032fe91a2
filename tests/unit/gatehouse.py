"""A gate over process memory, with its clock, events and pauses in the test's hands."""

from __future__ import annotations

from taskguard import errors
from taskguard.envelope import Envelope
from taskguard.events import Event
from taskguard.gate import Custody, Gate, Terms
from taskguard.record import Record
from taskguard.settings import Settings
from taskguard.settlement import Settlement
from taskguard.stores.memory import MemoryStore
from tests.clocks import ManualClock
from tests.contracts.messages import LEASE, existing

TERMS = Terms(max_crashes=3, retention=60.0)


class SwitchableStore(MemoryStore):
    """Process memory that can be told not to answer the next calls, or to do them and lose the replies."""

    silent_for = 0
    forgets = 0

    def _run(self, work):  # type: ignore[no-untyped-def]
        if self.silent_for:
            self.silent_for -= 1
            raise errors.StoreUnavailable("the store does not answer")
        answer = super()._run(work)
        if self.forgets:
            self.forgets -= 1
            raise errors.StoreUnavailable("the reply was lost")
        return answer

    def forget(self, id: str) -> None:
        """Have no record of it, as a server that crashed before it wrote that down."""
        super()._run(lambda unit: unit.delete(id))


class House:
    """A gate over process memory, with the clock, the events and the pauses in the test's hands."""

    def __init__(self, clock: ManualClock, **settings: object) -> None:
        self.clock = clock
        self.store = SwitchableStore(clock)
        self.events: list[Event] = []
        self.pauses: list[float] = []
        self.gate = Gate(
            self.store,
            Settings.read({"namespace": "shop", "lease": LEASE, **settings}, {}, {}),
            notify=self.events.append,
            clock=clock,
            sleep=self.pauses.append,
        )

    def enter(self, envelope: Envelope, terms: Terms = TERMS, *, holder: str = "worker-1/a") -> Custody | Settlement:
        return self.gate.enter(envelope, terms, holder=holder)

    def custody(self, envelope: Envelope, terms: Terms = TERMS, *, holder: str = "worker-1/a") -> Custody:
        entered = self.enter(envelope, terms, holder=holder)
        assert isinstance(entered, Custody), entered
        return entered

    def record(self, envelope: Envelope) -> Record:
        return existing(self.store, envelope.id)

    @property
    def told(self) -> list[str]:
        return [event.name for event in self.events]
