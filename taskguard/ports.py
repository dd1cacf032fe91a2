"""The ports: what the domain needs from a store and from a broker. The docstrings are the contract.

Every operation is atomic: one script, one transaction, one lock. Instants are epoch seconds, durations seconds.
Operations that carry a token or a holder return False, and change nothing, when it is stale. Every operation raises
StoreUnavailable when the store does not answer within its timeout; whether the change was made is then unknown, and
every operation may be repeated: a step that was made already, by the same token, answers True and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from taskguard.custody import Claim, Depth, Entered, Hold, Leased, Resting, ResultEntry, Unique
from taskguard.envelope import Envelope
from taskguard.permits import AdaptiveView, Answer, Ask, CircuitView, Outcomes, ProbeOutcome, Slot
from taskguard.policies.circuit import CircuitBreaker, CircuitState
from taskguard.record import Attempt, Failure, Record, State
from taskguard.rules import Rule, RuleChange, RuleSet
from taskguard.traffic import Asked, Counted


class MessageStore(Protocol):
    """Custody of running messages, and every message at rest."""

    # -- custody ----------------------------------------------------------------------------------------------------

    def claim(self, envelope: Envelope, *, holder: str, lease: float, max_crashes: int) -> Claim:
        """Take custody of *envelope*, whole, for *lease* seconds. *holder* is unique to this delivery.

        Where custody would be given to a revoked task id, the answer is `Dropped("revoked")`, recorded as discarded.
        A claim repeated by the same holder (a lost reply) answers `Claimed` with the same token.
        """

    def joined_with(self, permits: PermitStore) -> JointStore | None:
        """What claims and asks *permits* in one step; None where each is asked by itself."""

    def renew(self, holds: Sequence[Hold], *, lease: float, keep: bool) -> list[bool]:
        """Prolong these runs' leases in one call. With *keep*, each becomes the only copy of its message.

        False where the holder has no run: not claimed yet, ended, or taken over.
        """

    def holds(self, id: str, token: int) -> bool:
        """Whether the run with this token still has custody."""

    def complete(
        self, id: str, token: int, *, result: bytes, retention: float, entry: ResultEntry | None = None
    ) -> bool:
        """The run succeeded. The result is kept for *retention* seconds; duplicates waiting for it become due.

        *entry* is written in the same step; it is given only to a store that `writes_results_to` its server.
        """

    def writes_results_to(self, host: str, port: int, user: str = "") -> bool:
        """Whether `complete` can write what a result backend writes on this server as this user (of an access list).

        So it is where both are the store's own: another user may be refused what the backend may do.
        """

    def rest(self, id: str, token: int, envelope: Envelope, *, due_at: float, attempt: Attempt | None) -> bool:
        """Retry or defer: from the run to a message that is due at *due_at*."""

    def bury(self, id: str, token: int, *, failure: Failure, attempt: Attempt | None) -> bool:
        """The run failed for good: a dead letter. Duplicates waiting for it become due."""

    def discard(self, id: str, token: int, *, reason: str, retention: float) -> bool:
        """The run ended without an effect. Duplicates waiting for it become due."""

    def crash(self, hold: Hold, envelope: Envelope, *, attempt: Attempt) -> bool:
        """The parent saw the child of this run die: count it and make the message due now.

        Where the child died before it could claim, the message is recorded with one crash. False when the run has
        already ended, or is another holder's.
        """

    def finish(self, holds: Sequence[Hold]) -> None:
        """All that follows these runs' outcome is done: let their kept messages go."""

    # -- messages at rest -------------------------------------------------------------------------------------------

    def schedule(
        self, envelope: Envelope, *, due_at: float, waits_on: str = "", lease: str = "", unique: Unique | None = None
    ) -> str:
        """Keep a message, beside its key's record, until *due_at*. Repeating it changes nothing, unless a relay has
        leased the message meanwhile: then it has come back, and the relay's lease is void.

        With *lease*, the caller publishes it at once and shows the lease to `remove`; *due_at* is then the moment a
        relay takes over. With *waits_on*, it is due as soon as that primary record ends (at once if it has). With
        *unique*, nothing is kept if another task holds the name. Returns the task id that holds the name, else the
        message's own.
        """

    def bury_message(self, envelope: Envelope, *, failure: Failure, history: str = "") -> str:
        """A dead letter for a message that was never claimed. Returns its id; repeating it changes nothing."""

    def take_due(self, *, limit: int, lease: float) -> list[Leased]:
        """Lease up to *limit* due messages to the caller, the longest due first; ended runs are counted as crashed."""

    def due_in(self) -> float | None:
        """Seconds until the next message is due or run's lease ends, negative where one has been; None without any."""

    def watch_due(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
        """Call *told* with True soon after a message at rest was given a moment before those of all others.

        Of what comes within a quarter of a second after something that was told, nothing need be told.
        Blocks until *stop* says so, which is asked every few seconds. It is True once for the beginning, and False
        where the connection is lost: then nothing is said until it is True again. A store that cannot push returns at
        once.
        """

    def remove(self, leased: Sequence[Leased]) -> int:
        """These are published. Returns how many were still leased to the caller."""

    # -- names ------------------------------------------------------------------------------------------------------

    def release_unique(self, name: str, task_id: str) -> bool:
        """Let the name go if *task_id* holds it."""

    def revoke(self, task_ids: Sequence[str], *, retention: float) -> None:
        """Claims by these task ids are dropped for *retention* seconds."""

    # -- operators --------------------------------------------------------------------------------------------------

    def find(self, id: str) -> Record | None:
        """The record with this id."""

    def scan(self, state: State) -> Iterator[Record]:
        """All records in a state, read in pages; those that move meanwhile may be missed.

        The oldest entry comes first; a store may give the running ones in the order in which their leases end.
        """

    def depths(self) -> Mapping[State, Depth]:
        """How many records are in each state, every state named, and since when the oldest."""

    def requeue(self, id: str, envelope: Envelope, *, due_at: float) -> bool:
        """Make a dead letter due again as *envelope*. False when it is no dead letter any more."""

    def purge(self, id: str, *, retention: float) -> bool:
        """Forget a dead letter. A primary leaves a discarded record for *retention* seconds. False when none."""

    def expire(self, *, limit: int) -> int:
        """Remove up to *limit* records whose time is over. A store that forgets by itself returns 0."""

    def now(self) -> float:
        """The store's clock."""

    def ping(self) -> None:
        """Return if the store answers and is set up; raise StoreError with the way out if not."""

    def close(self) -> None:
        """Give connections back. The store may be used again."""


class JointStore(Protocol):
    """A message store and a permit store on one server, which do in one step what a run begins with."""

    def claim(
        self, envelope: Envelope, *, holder: str, lease: float, max_crashes: int, ask: Ask, resting: Resting | None
    ) -> Entered:
        """`MessageStore.claim`, and where that gives custody `PermitStore.admit`; not where the claim is repeated.

        With *resting*, a rate that books a slot before the message's deadline has it rest until then, to the
        millisecond after, as `MessageStore.rest` does.
        """


class PermitStore(Protocol):
    """Rates, slots and circuits that a whole fleet shares. Beside the message store, in the same server and namespace.

    Instants are the server's: no process's clock decides. A store that was emptied admits as a new one does.
    """

    def admit(self, ask: Ask) -> Answer:
        """Decide all that *ask* needs, in one step and one round trip: everything is taken, or nothing is."""

    def release(self, slots: Sequence[Slot]) -> None:
        """Give slots back. One that its holder does not have (released, lease over) changes nothing."""

    def renew_slots(self, slots: Sequence[Slot], *, lease: float) -> list[bool]:
        """Prolong their leases. False where the holder has lost it: another call may have the place."""

    def unbook(self, name: str, slot_at: float) -> None:
        """A booking of the limit *name* for this instant will not be used: who books next may have its slot."""

    def report(
        self, name: str, policy: CircuitBreaker, outcomes: Outcomes, probe: ProbeOutcome | None = None
    ) -> CircuitView:
        """Count these calls in the fleet's window and answer how the circuit stands then.

        Outcomes and probes of an older generation are not counted.
        """

    def circuit(self, name: str) -> CircuitView:
        """How the circuit stands; closed where nothing was ever reported."""

    def circuits(self) -> list[CircuitView]:
        """All circuits that the store knows."""

    def watch_circuits(self, changed: Callable[[CircuitView], None], *, stop: Callable[[], bool]) -> None:
        """Call *changed* for each change of any circuit, soon after it was made, until *stop* says so. Blocks.

        It begins with how those stand that ever changed. A store that cannot push asks every 50 ms or so. A connection
        that is lost is made again; circuits that changed meanwhile are told then.
        """

    def force(self, name: str, state: CircuitState, *, until: float | None, who: str, why: str) -> CircuitView:
        """An operator's word: "forced_open", "forced_closed", "disabled", until an instant or for good; "closed" takes
        it back and starts anew."""

    def adapt(self, name: str, limit: float, *, why: str) -> AdaptiveView:
        """Set the limit under this name, and keep why."""

    def adaptive(self, name: str) -> AdaptiveView | None:
        """The limit under this name, None where none was set."""

    def pause(self, queue: str, *, until: float | None, who: str, why: str) -> None:
        """Workers stop consuming *queue* until an instant, or until `resume`."""

    def resume(self, queue: str) -> bool:
        """Workers consume *queue* again. False where it was not paused."""

    def paused(self) -> Mapping[str, tuple[float | None, str, str]]:
        """The paused queues: until when, who and why."""

    def watch_paused(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
        """As `MessageStore.watch_due`, soon after a queue was paused or resumed; not when a pause ends by itself."""

    def now(self) -> float:
        """The store's clock."""

    def close(self) -> None:
        """Give connections back. The store may be used again."""


class RuleStore(Protocol):
    """The rules of a namespace. Beside the message store, in the same server.

    Each change makes a new version, larger than every one before it, also where the store was emptied in between. A
    change is checked whole before it is made: readers see a valid set before it, or a valid set after it.
    """

    def rules(self, known: int = 0) -> RuleSet | None:
        """All rules, None where their version is *known*."""

    def version(self) -> int:
        """The version the rules have; 0 where none were ever made."""

    def put(
        self, rules: Sequence[Rule], *, who: str, why: str, replace: bool = False, tiers: Sequence[str] | None = None
    ) -> int:
        """Add these rules, and take the places of those with the same ids, with *replace* of all. Returns the version.

        tiers: those that are declared from now on, kept and read with the rules; None leaves them as they are.
        What changes nothing makes no version. Raises ConfigurationError where the set as a whole cannot work.
        """

    def delete(self, ids: Sequence[str], *, who: str, why: str) -> list[str]:
        """Remove these rules. Returns the ids that were there."""

    def changes(self, *, limit: int = 20) -> list[RuleChange]:
        """The last changes, newest first. The store keeps at least a hundred."""

    def watch(self, changed: Callable[[int], None], *, stop: Callable[[], bool]) -> None:
        """Call *changed* with the version at once, and soon after each change, until *stop* says so. Blocks.

        A store that can push tells at once; every one looks each half second too. A lost connection is made again. An
        outage is not raised: *changed* is not called while it lasts.
        """

    def close(self) -> None:
        """Give connections back. The store may be used again."""


class DemandStore(Protocol):
    """What was asked of the limits of a namespace, in windows of `traffic.WINDOW` seconds by the store's clock.

    Kept for `traffic.KEPT` seconds. A count that is repeated after a lost reply is counted twice: it is for people and
    alerts, and decides nothing.
    """

    def add(self, asked: Sequence[Asked]) -> list[Counted]:
        """Count these in the window that is now. Answers the fleet's sums in it, for those with a row of their own.

        A window has at most `traffic.MOST` rows; what comes after them is counted as `traffic.OTHER`.
        """

    def read(self, *, since: float) -> list[Counted]:
        """All windows that end after *since*, the oldest first."""

    def now(self) -> float:
        """The store's clock."""

    def close(self) -> None:
        """Give connections back. The store may be used again."""


class Publisher(Protocol):
    """Hands messages to the broker."""

    def publish(self, envelopes: Sequence[Envelope]) -> Sequence[Exception | None]:
        """Publish in order, with the broker's confirmation. For each message None, or why it could not be published.

        A message the broker refuses does not hold up the others; a broker that is away fails all that are left.
        """
        ...
