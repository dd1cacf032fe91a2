"""The play: orders come in, the bank goes down, a worker is killed, and it goes on until every order has its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from taskguard.demo.contestants import Contestant
from taskguard.demo.crew import Crew
from taskguard.demo.ledger import BankBooks, Reckoning, reckon
from taskguard.demo.orders import Kind, Order, parts
from taskguard.demo.playground import Playground
from taskguard.demo.screen import Screen, Snapshot
from taskguard.demo.servers import BankLine
from taskguard.demo.shop import Shop

TICK = 0.2
BANK_DELAY = 0.02
BANK_LIMIT = 60
"""Charges a second; what `workers.payments` and `workers.stock` declare."""
BANK_FAILS_AT, BANK_FAILS_FOR = 0.2, 3.0
KILL_AT = 0.5
SLOW_ANSWER = 5.0
SLOW_LEFT = 2.0
"""Seconds before a slow answer in which no worker is killed over it any more: it could come before the kill."""
NEW_WORKER_AFTER = 2.0
STANDSTILL = 15.0
"""Seconds without any change after which what is not finished never will be: more than any wait in the play."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """What one performance needs."""

    contestant: Contestant
    ground: Playground
    bank: BankLine
    queue: str
    orders: Sequence[Order]
    environ: Mapping[str, str]

    @property
    def journal(self) -> Path:
        """Where the workers note every delivery."""
        return self.ground.path / f"{self.queue}-deliveries.log"


class Play:
    """One performance. `run` returns the reckoning."""

    def __init__(self, cast: Cast, screen: Screen) -> None:
        self._cast = cast
        self._screen = screen
        self._books = BankBooks(cast.bank.books)
        self._shop = Shop(
            cast.contestant.charge,
            cast.orders,
            queue=cast.queue,
            seconds=max(8.0, len(cast.orders) / 33),
            stale=cast.contestant.stale,
        )
        cast.journal.unlink(missing_ok=True)
        environ = {**cast.environ, **cast.contestant.environ(), "CHAOS_JOURNAL": str(cast.journal)}
        self._crew = Crew(cast.ground, cast.contestant.target, queue=cast.queue, environ=environ)
        self._slow = [order.id for order in cast.orders if order.kind is Kind.SLOW]
        self._troubled, self._sound = parts(cast.orders)
        self._acts: list[Callable[[], bool]] = [
            self._bank_fails, self._bank_recovers, self._kill, self._replace, self._calm, self._misshape,
        ]  # fmt: skip
        self._all_settled = False
        self._moved_at = 0.0
        self._bank_down_until = 0.0
        self._spares_the_bank = False
        self._spared_since: float | None = None
        self._killed = ""
        self._killed_at = 0.0
        self._held: list[str] = []
        self._began = 0.0

    def run(self) -> Reckoning:
        """Perform. Ends all workers, whatever happens."""
        self._cast.bank.administer(
            delay=BANK_DELAY,
            limit=BANK_LIMIT,
            frozen=[order.id for order in self._cast.orders if order.kind is Kind.FROZEN],
            slow=dict.fromkeys(self._slow, SLOW_ANSWER),
        )
        with self._crew as crew, closing(self._shop):
            self._screen.say(f"two {self._cast.contestant.title} workers start, two processes each")
            for name in ("worker-1", "worker-2"):
                crew.start(name)
            crew.wait()
            self._began = time.monotonic()
            self._shop.allow(self._troubled)
            self._shop.start()
            self._screen.say(f"{len(self._cast.orders)} orders come in")
            self._watch()
            hidden = self._shop.hidden()
            seconds = time.monotonic() - self._began
        return reckon(
            self._cast.orders,
            self._books.by_order(),
            self._cast.contestant.ends(self._cast.orders),
            deliveries=self._deliveries(),
            held=self._held,
            hidden=hidden,
            probes=0 if self._spared_since is None else self._books.turned_away(since=self._spared_since),
            seconds=seconds,
        )

    def clear(self) -> None:
        """Delete the queue and the results."""
        self._shop.clear()

    def _watch(self) -> None:
        before, self._moved_at = None, time.monotonic()
        while True:
            if self._shop.error is not None:
                raise self._shop.error
            if self._acts and self._acts[0]():
                self._acts.pop(0)
            for news in self._crew.supervise(absent=self._killed):
                self._screen.say(news, "trouble")
            self._look_at_the_circuit()
            snapshot = self._look()
            self._screen.show(snapshot)
            if snapshot.progress != before:
                before, self._moved_at = snapshot.progress, time.monotonic()
            self._all_settled = snapshot.settled == snapshot.placed and not snapshot.waiting
            if not self._acts and not self._shop.open:
                if self._all_settled:
                    return
                if self._stands_still or self._crew.gone:
                    why = "no worker is left" if self._crew.gone else f"nothing has moved for {STANDSTILL:.0f} s"
                    self._screen.say(f"{why}: the rest is counted as it is")
                    return
            time.sleep(TICK)

    @property
    def _stands_still(self) -> bool:
        return time.monotonic() - self._moved_at > STANDSTILL

    def _look(self) -> Snapshot:
        failures = self._cast.contestant.failures(self._cast.orders)
        dead = Counter(
            next(failures[task_id] for task_id in order.task_ids if task_id in failures)
            for order in self._cast.orders
            if any(task_id in failures for task_id in order.task_ids)
        )
        placed = self._shop.placed
        return Snapshot(
            orders=len(self._cast.orders),
            placed=placed,
            charged=self._books.charged(),
            dead=dict(dead.most_common()),
            waiting=self._shop.waiting() + self._cast.contestant.unsettled(self._cast.orders[:placed]),
            bank_up=time.monotonic() >= self._bank_down_until,
            workers=self._crew.up | ({self._killed: False} if self._killed else {}),
        )

    def _look_at_the_circuit(self) -> None:
        """Tell when it opens and closes. It lets nothing through for a second, so a tick is soon enough."""
        spares = self._cast.contestant.spares_the_bank()
        if spares and not self._spares_the_bank:
            self._spared_since = self._spared_since or time.time()
            self._screen.say("its circuit opens: orders rest, and a probe a second finds out")
        elif self._spares_the_bank and not spares:
            self._screen.say("the circuit closes: what rested comes back, slowly at first", "relief")
        self._spares_the_bank = spares

    def _passed(self, share: float) -> bool:
        return self._shop.placed >= share * len(self._cast.orders)

    def _bank_fails(self) -> bool:
        if not self._passed(BANK_FAILS_AT):
            return False
        self._cast.bank.administer(down_for=BANK_FAILS_FOR)
        self._bank_down_until = time.monotonic() + BANK_FAILS_FOR
        self._screen.say(f"the bank is down: for {BANK_FAILS_FOR:.0f} s it answers 503 to everybody", "trouble")
        return True

    def _bank_recovers(self) -> bool:
        if time.monotonic() < self._bank_down_until:
            return False
        self._screen.say("the bank is up again", "relief")
        return True

    def _kill(self) -> bool:
        """Kill a worker that waits for the bank to answer after the money was taken: there is no worse moment."""
        if not self._passed(KILL_AT):
            return False
        in_hand = self._books.in_hand(within=SLOW_ANSWER - SLOW_LEFT)
        waiting = [caller for order_id, caller in in_hand if order_id in self._slow]
        if waiting:
            self._killed = waiting[0].partition("@")[0]
        elif self._shop.held and (self._slow_are_over() or self._stands_still):
            self._killed = "worker-1"
        else:
            return False
        self._crew.kill(self._killed)
        self._killed_at = time.monotonic()
        self._held = [order_id for order_id, _ in self._books.in_hand(f"{self._killed}@")]
        count = f"{len(self._held)} order{'s' * (len(self._held) != 1)}"
        self._screen.say(f"{self._killed} is SIGKILLed, processes and all, {count} half done", "trouble")
        return True

    def _slow_are_over(self) -> bool:
        books = self._books.by_order()
        return all(order_id in books and books[order_id].answers[201] for order_id in self._slow)

    def _replace(self) -> bool:
        if time.monotonic() < self._killed_at + NEW_WORKER_AFTER:
            return False
        self._crew.start(self._killed)
        self._screen.say(f"a new {self._killed} starts", "relief")
        self._killed = ""
        return True

    def _calm(self) -> bool:
        """All troubles are over: the orders that come now meet none."""
        self._all_settled, self._moved_at = False, time.monotonic()
        self._shop.allow(self._sound)
        return True

    def _misshape(self) -> bool:
        """The misshapen orders come when no other can be hurt by them any more."""
        if not self._shop.held or not (self._all_settled or self._stands_still):
            return False
        if not self._all_settled:
            self._screen.say(f"nothing has moved for {STANDSTILL:.0f} s; now the misshapen orders come")
        self._shop.allow(len(self._cast.orders))
        return True

    def _deliveries(self) -> Counter[str]:
        try:
            return Counter(self._cast.journal.read_text().splitlines())
        except FileNotFoundError:
            return Counter()
