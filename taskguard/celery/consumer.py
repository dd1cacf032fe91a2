"""The consumer: what arrives is checked before Celery unpacks it, so that no message can kill the worker or vanish.

Unknown tasks, unreadable bodies, refused content types, bad instants and messages of the wrong shape become dead
letters with the bytes as they came. Messages that carry an ``eta`` rest in the store instead of in this worker's
memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from celery import signals
from celery.exceptions import NotRegistered
from celery.utils.time import maybe_iso8601
from celery.worker import state
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.exceptions import ContentDisallowed

from taskguard.celery.flaws import flaw_of, is_name, shape_flaw
from taskguard.celery.message import context_of, raw_envelope, received_envelope
from taskguard.celery.request import ReliableRequest
from taskguard.celery.runtime import Runtime, runtime_of
from taskguard.celery.task import ReliableTask
from taskguard.clock import instant, wall_clock
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, MessageError, StoreError
from taskguard.events import Event
from taskguard.record import Failure, Reason

STORE_PAUSE = 1.0
"""Seconds the worker waits before it gives a message back that it cannot bury, lest the two go round at full speed."""

Strategy = Callable[..., Any]


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Celery's consumer, which keeps what Celery drops."""

    def update_strategies(self) -> None:
        """Put the check in front of every task's strategy, plain tasks included."""
        super().update_strategies()
        for name, strategy in self.strategies.items():
            self.strategies[name] = self._checked(strategy, self.app.tasks[name])

    def cancel_active_requests(self) -> None:
        """A cold shutdown: break off what runs, also where the message was acknowledged early. The store has it."""
        super().cancel_active_requests()
        for request in tuple(state.active_requests):
            if isinstance(request, ReliableRequest) and request.can_be_broken_off:
                with suppress(NotImplementedError):  # threads cannot be; their leases end with the worker
                    request.cancel(self.pool, emit_retry=False)

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """Take a message in. Whatever its handling raises, but the broker's own errors, is about this message alone."""
        receive = super().create_task_handler(*args, **options)
        broker_errors = (*self.connection_errors, *self.channel_errors)

        def received(message: Any) -> Any:
            try:
                if isinstance(message.headers, Mapping) and not is_name(message.headers.get("task", "protocol 1")):
                    return self.on_unknown_message(None, message)
                return receive(message)
            except (*broker_errors, MemoryError):
                raise
            except Exception as exc:  # noqa: BLE001 (it would end the worker, and the next one after it)
                if message.acknowledged:
                    _logger().exception("a message was settled, but not all that follows: %r", message)
                    return None
                return self._bury(message, Reason.PERMANENT_ERROR if _is_sound(message) else Reason.UNDECODABLE, exc)

        return received

    def _checked(self, strategy: Strategy, task: Any) -> Strategy:
        runtime = runtime_of(self.app)
        reliable = task if isinstance(task, ReliableTask) else None

        def checked(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **options: Any) -> Any:
            flaw = flaw_of(message) if body is None else shape_flaw(body, message.headers)
            if flaw is not None:
                return self._bury(message, Reason.UNDECODABLE, MessageError(flaw))
            plain_shape = body is None and not isinstance(message.payload, Mapping)
            if plain_shape and message.headers.get("eta") and self._rests(runtime, message, reliable):
                return ack(_logger(), self.connection_errors)
            try:
                return strategy(message, body, ack, reject, callbacks, **options)
            except (ConfigurationError, MessageError) as exc:
                return self._bury(message, Reason.REJECTED, exc)

        return checked

    def _rests(self, runtime: Runtime, message: Any, task: ReliableTask | None) -> bool:
        """Keep a message that is not due yet. False: due, or the store is away and Celery may hold it."""
        due_at = instant(maybe_iso8601(message.headers["eta"]), now=wall_clock(), what="eta")
        if due_at <= wall_clock():
            message.headers["eta"] = None
            return False
        envelope = received_envelope(message, task)
        envelope = envelope.replace(headers={**envelope.headers, "eta": None})
        try:
            runtime.store.schedule(envelope, due_at=due_at)
        except StoreError:
            return False
        return True

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Not a task message at all."""
        self._bury(message, Reason.UNDECODABLE, MessageError("the message has no task name in its headers or body"))

    def on_unknown_task(self, body: Any, message: Any, exc: BaseException) -> None:
        """No task of this name is registered here."""
        named = message.headers.get("task") if isinstance(message.headers, Mapping) else None
        unknown = LookupError(f"no task named {named!r} is registered in this worker; deploy it, then requeue")
        if self._bury(message, Reason.UNKNOWN_TASK, unknown) and is_name(named):
            task_id = message.headers.get("id")
            if self.event_dispatcher:
                self.event_dispatcher.send("task-failed", uuid=task_id, exception=f"NotRegistered({named!r})")
            signals.task_unknown.send(sender=self, message=message, exc=exc, name=named, id=task_id)

    def on_invalid_task(self, body: Any, message: Any, exc: BaseException) -> None:
        """Celery refused to unpack the message."""
        self._bury(message, Reason.REJECTED if isinstance(exc, ContentDisallowed) else Reason.UNDECODABLE, exc)

    def on_decode_error(self, message: Any, exc: BaseException) -> None:
        """The body cannot be read, or must not be."""
        self._bury(message, Reason.REJECTED if isinstance(exc, ContentDisallowed) else Reason.UNDECODABLE, exc)

    def _bury(self, message: Any, reason: Reason, exc: BaseException) -> bool:
        """Keep the message as a dead letter, show its failure, and let the broker's copy go."""
        runtime = runtime_of(self.app)
        envelope = raw_envelope(message)
        try:
            runtime.store.bury_message(envelope, failure=Failure.of(reason, exc))
        except StoreError as store_error:
            runtime.observers(Event(name="store_unavailable", detail=f"burying {envelope.task_id}: {store_error}"))
            time.sleep(STORE_PAUSE)
            message.requeue()
            return False
        runtime.observers(
            Event(
                name="dead_lettered", task=envelope.task, task_id=envelope.task_id, key=envelope.key, detail=str(reason)
            )
        )
        runtime.tell(lambda: self._end_shown(runtime, message, envelope, reason, exc))
        return True

    def _end_shown(
        self, runtime: Runtime, message: Any, envelope: Envelope, reason: Reason, exc: BaseException
    ) -> None:
        """Show the failure, then let the broker's copy go: whoever dies in between leaves the message to another."""
        shown = NotRegistered(envelope.task) if reason is Reason.UNKNOWN_TASK else MessageError(f"{reason}: {exc}")
        try:
            if isinstance(message.headers, Mapping) and is_name(message.headers.get("id")):
                # With its context, where that can be believed: the chord and the chain it belongs to wait for it.
                context = context_of(self.app, envelope) if _is_sound(message) else None
                self.app.backend.mark_as_failure(envelope.task_id, shown, request=context)
        except Exception as failed:  # noqa: BLE001 (result backends raise what their drivers raise; the letter is kept)
            runtime.observers(Event(name="announce_failed", task_id=envelope.task_id, detail=repr(failed)))
        finally:
            settle = message.reject_log_error if reason is Reason.UNKNOWN_TASK else message.ack_log_error
            self.call_soon(settle, _logger(), self.connection_errors)


def _is_sound(message: Any) -> bool:
    """Whether Celery can take the message's parts for what they claim to be."""
    try:
        return flaw_of(message) is None
    except Exception:  # noqa: BLE001 (decoding raises what the codecs raise)
        return False


def _logger() -> Any:
    from celery.worker.consumer.consumer import logger

    return logger
