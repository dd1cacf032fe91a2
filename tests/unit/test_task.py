"""`ReliableTask`: what is declared, what a call stamps, and what a run sees of itself."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, Task
from freezegun import freeze_time

import taskguard
from taskguard import Budget, ConfigurationError, DuplicateTask, ReliableTask, Retry
from taskguard.envelope import Envelope
from taskguard.headers import KEY
from taskguard.record import State

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def app(namespace: str) -> Celery:
    """An application whose broker and store are process memory."""
    app = Celery(f"t-{namespace}", broker="memory://", set_as_current=False)
    app.conf.task_default_queue = namespace
    taskguard.install(app, store="memory://", namespace=namespace)
    return app


def declare(app: Celery, **options: Any) -> Any:
    """The task ``shop.charge``."""

    @app.task(base=ReliableTask, shared=False, name="shop.charge", **options)
    def charge(order_id: int, *, cents: int = 100) -> int:
        return cents

    app.finalize()
    return app.tasks["shop.charge"]


def received(app: Celery) -> list[Any]:
    """The messages in the application's queue."""
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        return list(iter(lambda: queue.get(no_ack=True), None))


def stamp(app: Celery) -> dict[str, Any]:
    """What taskguard wrote on the one message in the queue."""
    (message,) = received(app)
    found: dict[str, Any] = message.headers[KEY]
    return found


# -- three ways to declare ---------------------------------------------------------------------------------------------


def by_subclass(app: Celery) -> Any:
    class Charge(ReliableTask):
        name = "shop.charge"
        idempotency_key = "charge:{order_id}"

        def run(self, order_id: int) -> int:
            return order_id

    return app.register_task(Charge())


def by_base(app: Celery) -> Any:
    @app.task(base=ReliableTask, shared=False, name="shop.charge", idempotency_key="charge:{order_id}", bind=True)
    def charge(self: Any, order_id: int) -> int:
        return order_id

    return app.tasks["shop.charge"]


def by_application(app: Celery) -> Any:
    app.task_cls = "taskguard:ReliableTask"
    app.__dict__.pop("Task", None)

    @app.task(shared=False, name="shop.charge", idempotency_key="charge:{order_id}")
    def charge(order_id: int) -> int:
        return order_id

    return app.tasks["shop.charge"]


@pytest.mark.parametrize("way", [by_subclass, by_base, by_application], ids=lambda way: way.__name__)
def test_there_are_three_ways_to_declare(way: Callable[[Celery], Any], app: Celery) -> None:
    """Subclass, ``base=``, and the application's ``task_cls``: the same task, and a function still."""
    task = way(app)
    assert isinstance(task, ReliableTask)
    assert task(7) == 7
    task.delay(7)
    assert stamp(app)["key"] == "charge:7"


def test_a_key_can_be_a_function_of_the_class(app: Celery) -> None:
    """With or without ``staticmethod``, its arguments are the task's."""
    for declared in (staticmethod(lambda order_id: f"k{order_id}"), lambda order_id: f"k{order_id}"):

        class Charge(ReliableTask):
            name = "shop.charge"
            idempotency_key = declared

            def run(self, order_id: int) -> None: ...

        assert Charge().key_for((7,), {}, "id") == "k7"


def test_a_retry_policy_and_the_method_of_that_name_live_side_by_side(app: Celery) -> None:
    """``retry = Retry(...)`` in the class body declares; ``self.retry()`` still asks."""

    class Charge(ReliableTask):
        retry = Retry(max_retries=7)  # type: ignore[assignment]

        def run(self) -> None: ...

    assert Charge.retry_policy == Retry(max_retries=7)
    assert callable(Charge().retry)
    assert Charge().effective_retry.max_retries == 7


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"on_duplicate": "perhaps"}, "on_duplicate"),
        ({"on_expired": "ignore"}, "on_expired"),
        ({"unique_until": "later"}, "unique_until"),
        ({"on_queued": "drop"}, "on_queued"),
        ({"retention": 0}, "retention"),
        ({"unique_for": -1}, "unique_for"),
        ({"deadline": "soon"}, "deadline"),
        ({"max_crashes": 0}, "max_crashes"),
        ({"max_crashes": 1.5}, "max_crashes"),
        ({"idempotency_key": 7}, "idempotency_key"),
        ({"idempotency_key": "x:{missing}"}, "missing"),
        ({"acks_late": False}, "acks_late"),
    ],
)
def test_a_declaration_that_cannot_work_fails_where_it_is_made(
    options: dict[str, Any], named: str, app: Celery
) -> None:
    """In the class body, and at the decorator's line."""
    with pytest.raises(ConfigurationError, match=named):
        type("Charge", (ReliableTask,), {**options, "run": lambda self, order_id: None})
    with pytest.raises(ConfigurationError, match=named):

        @app.task(base=ReliableTask, shared=False, **options)
        def charge(order_id: int) -> None: ...


def test_an_abstract_base_may_declare_a_key_for_its_children() -> None:
    """The template is read where the body is."""

    class Base(ReliableTask):
        abstract = True
        idempotency_key = "charge:{order_id}"

    class Good(Base):
        def run(self, order_id: int) -> None: ...

    assert Good().key_for((7,), {}, "id") == "charge:7"
    with pytest.raises(ConfigurationError, match="order_id"):
        type("Bad", (Base,), {"run": lambda self, other: None})


# -- terms and policies ------------------------------------------------------------------------------------------------


def test_terms_are_the_tasks_or_else_the_settings(app: Celery) -> None:
    """Retention and crashes; a unique task says when its name is let go."""
    taskguard.install(app, store="memory://", retention=7, max_crashes=5)
    terms = declare(app, max_crashes=2, unique_for=60, unique_until="start", on_duplicate="drop").terms
    assert (terms.max_crashes, terms.retention, terms.on_duplicate, terms.release_unique) == (2, 7, "drop", "start")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"max_retries": 3, "first_delay": 1.0, "max_delay": 600.0, "jitter": "full"}),
        ({"max_retries": None, "retry_backoff": 5, "retry_backoff_max": 60}, {"max_retries": None, "first_delay": 5.0}),
        ({"retry_backoff": True, "retry_jitter": False}, {"first_delay": 1.0, "jitter": "none"}),
        ({"retry_backoff": 900, "retry_backoff_max": 60}, {"first_delay": 60.0, "max_delay": 60.0}),
    ],
)
def test_without_a_policy_celerys_options_are_one(options: Any, expected: dict[str, Any], app: Celery) -> None:
    """Its names, its defaults."""
    policy = declare(app, **options).effective_retry
    assert {name: getattr(policy, name) for name in expected} == expected


def test_a_budget_is_counted_once_per_task(app: Celery) -> None:
    """One keeper for all runs of this process; none where none is declared."""
    task = declare(app, retry=Retry(budget=Budget()))
    assert task.budget is task.budget is not None
    other = Celery("other", broker="memory://", set_as_current=False)
    taskguard.install(other, store="memory://")
    assert declare(other).budget is None


# -- what a call stamps ------------------------------------------------------------------------------------------------


def test_the_key_does_not_depend_on_how_the_arguments_are_spelt(app: Celery) -> None:
    """Positional or by name: one key, one fingerprint; the default is part of it."""
    task = declare(app, idempotency_key="charge:{order_id}:{cents}")
    task.delay(7)
    task.delay(order_id=7, cents=100)
    first, second = (message.headers[KEY] for message in received(app))
    assert first == second
    assert first["key"] == "charge:7:100"


def test_without_a_declared_key_the_task_id_is_the_key(app: Celery) -> None:
    """So that a message published twice runs once."""
    result = declare(app).delay(7)
    assert stamp(app)["key"] == result.id


@pytest.mark.parametrize("way", ["apply_async", "signature", "send_task"])
def test_a_call_may_bring_its_own_key_and_deadline(way: str, app: Celery) -> None:
    """They outrank what the task declares, whoever sends."""
    task = declare(app, idempotency_key="charge:{order_id}", deadline=300)
    options: dict[str, Any] = {"idempotency_key": "mine", "deadline": 30}
    with freeze_time(NOW):
        match way:
            case "apply_async":
                task.apply_async((7,), **options)
            case "signature":
                task.s(7).set(**options).apply_async()
            case _:
                app.send_task("shop.charge", (7,), **options)
    found = stamp(app)
    assert found["key"] == "mine"
    assert found["deadline_ms"] == (NOW.timestamp() + 30) * 1000


@pytest.mark.parametrize(
    ("declared", "given", "seconds"),
    [
        (None, {}, None),
        (300, {}, 300),
        (timedelta(minutes=5), {}, 300),
        (None, {"deadline": timedelta(seconds=30)}, 30),
        (None, {"deadline": NOW + timedelta(seconds=45)}, 45),
        (300, {"deadline": 600}, 600),
        (None, {"expires": 20}, 20),
        (None, {"expires": NOW + timedelta(seconds=20)}, 20),
        (300, {"expires": 20}, 20),
        (10, {"expires": 20}, 10),
        (300, {"countdown": 0}, 300),
    ],
)
def test_the_deadline_is_the_earliest_there_is(
    declared: Any, given: dict[str, Any], seconds: float | None, app: Celery
) -> None:
    """The call's, else the task's; and Celery's ``expires``, which the broker does not see."""
    task = declare(app, deadline=declared)
    with freeze_time(NOW):
        task.apply_async((7,), **given)
        (message,) = received(app)
    expected = None if seconds is None else (NOW.timestamp() + seconds) * 1000
    assert message.headers[KEY].get("deadline_ms") == expected
    assert message.headers["expires"] is None
    assert "expiration" not in message.properties


@pytest.mark.parametrize("given", [{"deadline": "soon"}, {"deadline": -1}, {"idempotency_key": ""}])
def test_a_call_that_cannot_work_fails_at_the_caller(given: dict[str, Any], app: Celery) -> None:
    """Nothing is sent."""
    task = declare(app)
    with pytest.raises(ConfigurationError):
        task.apply_async((7,), **given)
    assert received(app) == []


@pytest.mark.parametrize("when", [{"countdown": 60}, {"eta": NOW + timedelta(seconds=60)}])
def test_what_is_delayed_rests_in_the_store(when: dict[str, Any], app: Celery) -> None:
    """Not in the broker, and not in a worker's memory; its ``eta`` has done its duty."""
    task = declare(app)
    with freeze_time(NOW):
        result = task.apply_async((7,), **when)
    assert received(app) == []
    (record,) = app.taskguard.store.scan(State.PENDING)  # type: ignore[attr-defined]
    assert (record.task_id, record.due_at) == (result.id, NOW.timestamp() + 60)
    assert Envelope.from_wire(record.wire).headers["eta"] is None


def test_what_was_delayed_into_the_past_is_sent_at_once(app: Celery) -> None:
    """There is nothing to wait for."""
    declare(app).apply_async((7,), eta=datetime.now(UTC) - timedelta(seconds=5))
    assert len(received(app)) == 1


@pytest.mark.parametrize("options", [{"countdown": 60}, {}])
def test_without_a_store_nothing_is_promised_that_needs_one(options: dict[str, Any], namespace: str) -> None:
    """A delay and uniqueness rest in the store: the producer is told, not the user at night."""
    app = Celery("bare", broker="memory://", set_as_current=False)
    app.conf.task_default_queue = namespace
    task = declare(app, **({} if options else {"unique_for": 60}))
    with pytest.raises(ConfigurationError, match="TASKGUARD_STORE"):
        task.apply_async((7,), **options)


# -- unique tasks ------------------------------------------------------------------------------------------------------


def test_a_unique_task_is_queued_once(app: Celery) -> None:
    """The second call is handed the first one's result; another key has a name of its own."""
    task = declare(app, unique_for=60, idempotency_key="charge:{order_id}")
    first, second, other = task.delay(7), task.delay(order_id=7), task.delay(8)
    assert first.id == second.id != other.id
    assert len(received(app)) == 2


def test_a_unique_task_can_raise_instead(app: Celery) -> None:
    """And says which task has the name."""
    task = declare(app, unique_for=60, idempotency_key="charge:{order_id}", on_queued="raise")
    first = task.delay(7)
    with pytest.raises(DuplicateTask, match=first.id):
        task.delay(7)


def test_a_unique_name_is_let_go_by_time(app: Celery) -> None:
    """``unique_for`` seconds, whatever became of the task."""
    task = declare(app, unique_for=60, idempotency_key="charge:{order_id}")
    with freeze_time(NOW) as time:
        first = task.delay(7)
        time.tick(61)
        assert task.delay(7).id != first.id


def test_a_delayed_unique_task_is_queued_once(app: Celery) -> None:
    """The resting message holds the name as a sent one does."""
    task = declare(app, unique_for=600, idempotency_key="charge:{order_id}")
    first = task.apply_async((7,), countdown=60)
    assert task.apply_async((7,), countdown=90).id == first.id
    assert task.delay(7).id == first.id
    assert received(app) == []


def test_a_message_that_carries_a_workflow_on_is_never_dropped(app: Celery) -> None:
    """A chain whose step gave way to another message would never end."""
    task = declare(app, unique_for=60, idempotency_key="charge:{order_id}")
    first = task.delay(7)
    (task.si(7) | task.si(8)).apply_async()
    task.apply_async((7,), link=task.si(9))
    assert len({message.headers["id"] for message in received(app)} - {first.id}) == 2


# -- a run seen from inside --------------------------------------------------------------------------------------------


def test_a_direct_call_has_no_custody_to_lose(app: Celery) -> None:
    """Nothing is lost, and no deadline runs."""
    task = declare(app)
    assert (task(7), task.custody_lost, task.remaining()) == (100, False, None)


def test_a_retry_asked_for_outside_of_a_run_raises_as_celerys(app: Celery) -> None:
    """A plain call of a task that retries: the error itself."""
    task = declare(app)
    with pytest.raises(OSError, match="bank down"):
        task.retry(exc=OSError("bank down"))


def test_links_have_their_ids_before_they_are_sent(app: Celery) -> None:
    """Also the link of a link: published twice after a crash, each is recognised as one task."""
    task = declare(app)
    linked = task.si(8)
    linked.link(task.si(9))
    task.apply_async((7,), link=linked)
    (message,) = received(app)
    (callback,) = message.payload[2]["callbacks"]
    assert callback["options"]["task_id"]
    assert callback["options"]["link"][0]["options"]["task_id"]


def test_plain_tasks_are_sent_as_ever(app: Celery) -> None:
    """No stamp, and ``expires`` stays Celery's."""

    @app.task(base=Task, shared=False, name="plain")
    def plain() -> None: ...

    app.finalize()
    app.tasks["plain"].apply_async(expires=60)
    (message,) = received(app)
    assert KEY not in message.headers
    assert message.headers["expires"] is not None
