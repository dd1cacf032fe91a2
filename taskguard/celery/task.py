"""`ReliableTask`: the task class people subclass. It declares; the gate decides.

Celery calls ``__call__`` in the pool child, outside its autoretry wrapper, so a settlement raised here is final. The
class holds the declaration (key, deadline, duplicates, retries), the task's own view of its run (`custody`,
`remaining`), and the options of ``apply_async``; what happens to a delivery is in `taskguard.celery.run`.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from celery import Celery, Task
from celery._state import get_current_task
from celery.exceptions import Reject
from celery.result import AsyncResult

from taskguard.celery import run, transactional
from taskguard.celery.admission import declared_downstreams, declared_identity
from taskguard.celery.install import install
from taskguard.celery.publishing import capturing, queued_instead, sending, stamp_call, stamp_deadline
from taskguard.celery.runtime import Runtime, runtime_of
from taskguard.clock import Duration, instant, seconds, wall_clock
from taskguard.downstream.service import Downstream
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, CustodyLost, Refused
from taskguard.gate import Custody, OnDuplicate, OnExpired, Terms
from taskguard.idempotency import KeyMaker, fingerprint, key_maker
from taskguard.limiter.identity import TaskIdentity
from taskguard.policies import Retry
from taskguard.record import brief
from taskguard.retry import BudgetKeeper


class ReliableTask(Task):  # type: ignore[misc]
    """A Celery task that survives crashes, runs once per key, keeps its deadline and dies visibly.

    Declared in the class body or as options of ``@app.task(base=ReliableTask, ...)``:

    idempotency_key: a template over the arguments such as ``"charge:{order_id}"``, or a function of them; the task id
        when there is none.
    deadline: seconds from the sending, after which the work is not started.
    retry: a `Retry` policy. Without one, Celery's own retry options are followed.
    on_duplicate: what becomes of another message whose key is queued or running: "wait" for its outcome, "drop", or
        "raise" (the duplicate fails).
    on_expired: "dead_letter", or "discard" with state REVOKED.
    retention: seconds the result is kept for duplicates. max_crashes: as in `taskguard.Settings`.
    unique_for: seconds in which a second message with the same key is not queued; unique_until "start" or "success";
        on_queued "return" (the result of the task already queued) or "raise".
    downstream: a `Downstream`, or several, asked before the run begins; a refusal defers the task to its slot.
    limited: True has the store's rules (``taskguard limits``) asked before the run begins, by the task's name; a
        dictionary says who calls as well, each part a template or a function of the arguments, or "header:x-tenant":
        {"client": "{tenant}", "tier": "{plan}"}. A refusal defers the task.
    transactional: what the run writes through ``self.session``, the tasks it sends and its completion are committed
        together, or none of them; the store is in that database. session_factory: makes ``self.session``, where the
        one of `taskguard.Settings` is not to.
    interrupt_at_deadline: raise SoftTimeLimitExceeded in the run when its deadline comes (prefork pool).
    """

    abstract = True
    acks_late = True
    acks_on_failure = True
    acks_on_timeout = True
    acks_on_failure_or_timeout = True
    Request = "taskguard.celery.request:ReliableRequest"

    idempotency_key: str | Callable[..., str] | None = None
    deadline: Duration | datetime | None = None
    retry_policy: Retry | None = None
    on_duplicate: OnDuplicate = "wait"
    on_expired: OnExpired = "dead_letter"
    retention: Duration | None = None
    max_crashes: int | None = None
    unique_for: Duration | None = None
    unique_until: Literal["start", "success"] = "success"
    on_queued: Literal["return", "raise"] = "return"
    interrupt_at_deadline: bool = False
    downstream: Downstream | Sequence[Downstream] | None = None
    limited: bool | Mapping[str, str | Callable[..., object]] = False
    transactional: bool = False
    session_factory: Callable[[], Any] | str | None = None

    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "on_duplicate": ("wait", "drop", "raise"),
        "on_expired": ("dead_letter", "discard"),
        "unique_until": ("start", "success"),
        "on_queued": ("return", "raise"),
    }
    _signature: ClassVar[inspect.Signature | None] = None
    _key_maker: ClassVar[KeyMaker | None] = None
    _terms: ClassVar[Terms | None] = None
    _retry: ClassVar[Retry | None] = None
    _budget: ClassVar[BudgetKeeper | None] = None
    _downstreams: ClassVar[tuple[Downstream, ...]] = ()
    _identity: ClassVar[TaskIdentity | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        declared = cls.__dict__.get("retry")
        if isinstance(declared, Retry):
            # The declaration shares its name with Celery's method; keep both.
            cls.retry_policy = declared
            del cls.retry
        elif declared is not None and not callable(declared):
            raise ConfigurationError(f"{cls.__name__}: retry={declared!r} is no Retry; give Retry(max_retries=...)")
        if cls.before_start is not Task.before_start:
            # Celery would call it before the gate, where its failure would be nobody's to settle.
            cls.before_body = cls.before_start  # type: ignore[method-assign]
            cls.before_start = Task.before_start
        cls._signature = cls._key_maker = cls._terms = cls._retry = cls._budget = cls._identity = None
        _check(cls)

    @staticmethod
    def options() -> frozenset[str]:
        """The names of what this class adds to the options of a Celery task."""
        own = ReliableTask.__annotations__.keys() - {"retry_policy"}
        return frozenset(name for name in own if not name.startswith("_"))

    # -- declared ---------------------------------------------------------------------------------------------------

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Celery has bound the task to its application: wire taskguard in if nobody has."""
        install(app)

    @property
    def guard(self) -> Runtime:
        """What the application carries of taskguard."""
        return runtime_of(self.app)

    @property
    def terms(self) -> Terms:
        """The declaration, as the gate reads it."""
        if self._terms is None:
            settings = self.guard.settings
            type(self)._terms = Terms(
                max_crashes=settings.max_crashes if self.max_crashes is None else self.max_crashes,
                retention=settings.retention if self.retention is None else seconds(self.retention, what="retention"),
                on_duplicate=self.on_duplicate,
                on_expired=self.on_expired,
                release_unique=None if self.unique_for is None else self.unique_until,
            )
        assert self._terms is not None
        return self._terms

    @property
    def effective_retry(self) -> Retry:
        """The policy that retries what the body lets escape."""
        if self._retry is None:
            type(self)._retry = self.retry_policy or run.celery_policy(self)
        assert self._retry is not None
        return self._retry

    @property
    def budget(self) -> BudgetKeeper | None:
        """The counter of the policy's retry budget in this process."""
        declared = self.effective_retry.budget
        if declared is not None and self._budget is None:
            type(self)._budget = BudgetKeeper(declared)
        return self._budget

    @property
    def downstreams(self) -> tuple[Downstream, ...]:
        """The declared downstreams, in the order in which they are asked."""
        return self._downstreams

    @property
    def unique_seconds(self) -> float:
        """``unique_for`` in seconds."""
        return seconds(self.unique_for or 0.0, what="unique_for")

    def key_for(self, args: Sequence[Any], kwargs: Mapping[str, Any], task_id: str) -> str:
        """The idempotency key of a call: as declared, or the task id."""
        maker = type(self)._key_maker
        try:
            return task_id if maker is None else maker(args, kwargs)
        except ConfigurationError:
            raise
        except Exception as exc:
            raise ConfigurationError(
                f"{self.name}: idempotency_key raised {type(exc).__name__}: {brief(exc)}; it must take these arguments"
            ) from exc

    def fingerprint_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The payload's fingerprint: equal however the arguments are spelt."""
        return fingerprint(args, kwargs, _caller_signature(type(self)))

    # -- in the run -------------------------------------------------------------------------------------------------

    @property
    def custody(self) -> Custody:
        """The run's custody: ``token``, ``key``, ``crashes``, ``attempt``. Token 0 when called as a plain function."""
        held = getattr(self.request, "taskguard_custody", None)
        if isinstance(held, Custody):
            return held
        request = self.request
        args, kwargs = request.args or (), request.kwargs or {}
        key = self.key_for(args, kwargs, request.id or "direct")
        direct = Envelope(task=self.name, task_id=request.id or "direct", key=key, body=b"")
        return Custody(direct, self.guard.settings.namespace, holder="direct")

    @property
    def session(self) -> Any:
        """The SQLAlchemy Session of a transactional run; its transaction begins here, and ends with the run.

        Raises ConfigurationError in other tasks.
        """
        return transactional.session_of(self)

    @property
    def custody_lost(self) -> bool:
        """Whether another run may hold the key by now. Asks the store."""
        return not self.guard.gate.holds(self.custody)

    def before_body(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Celery's ``before_start``, called under custody: what a subclass defines under that name runs from here."""

    def ensure_custody(self) -> None:
        """Stop here if custody is lost: raises CustodyLost, and the run's outcome is discarded."""
        if self.custody_lost:
            raise CustodyLost(f"{self.name}: the lease ended and another run may hold the key; this one does not count")

    def remaining(self) -> float | None:
        """Seconds left until the deadline, never below zero; None without a deadline."""
        deadline = self.custody.envelope.deadline_at
        return None if deadline is None else max(0.0, deadline - wall_clock())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run under custody when a worker or eager mode calls; as a plain function otherwise."""
        request = self.request_stack.top
        if request is None or request.called_directly or request._protected:
            return super().__call__(*args, **kwargs)
        request._protected = 1
        return run.deliver(self, request, args, kwargs)

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Any = None,
        throw: bool = True,
        eta: Any = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Any:
        """Celery's ``self.retry``, its arguments and exceptions; the retry rests in the store, not in the broker."""
        request = self.request
        caught = sys.exc_info()[1]
        if caught is not None and caught is exc and isinstance(exc, (Reject, Refused)) and hasattr(self, "_orig_run"):
            raise caught  # Celery's autoretry caught it; it is a verdict, and no failure
        if request.called_directly or not hasattr(request, "taskguard_custody"):
            return super().retry(args, kwargs, exc, throw, eta, countdown, max_retries, **options)
        bound = self.max_retries if max_retries is None else max_retries
        request.taskguard_exhausted = bound is not None and request.retries >= bound
        with capturing() as capture:
            asked = super().retry(args, kwargs, exc, False, eta, countdown, max_retries, **options)
        request.taskguard_exhausted = False
        when = eta if eta is not None else self.default_retry_delay if countdown is None else countdown
        due_at = instant(when, now=wall_clock(), what="eta")
        following = capture.envelopes[0] if capture.envelopes else None
        request.taskguard_retry = run.AskedRetry(asked, following, due_at)
        if throw:
            raise asked
        return asked

    def replace(self, sig: Any) -> Any:
        """Celery's ``self.replace``; the replacement counts as a newer delivery, also where it keeps the key."""
        held = getattr(self.request, "taskguard_custody", None)
        if isinstance(held, Custody):
            run.stamp_replacement(sig, held.envelope.sequence + 1)
            self.request.taskguard_replaced = True
        return super().replace(sig)

    # -- sending ----------------------------------------------------------------------------------------------------

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        *,
        deadline: Duration | datetime | None = None,
        idempotency_key: str | None = None,
        session: Any = None,
        **options: Any,
    ) -> Any:
        """Celery's ``apply_async``, and: *deadline*, seconds from now or an instant; *idempotency_key*, for this call;
        *session*, in whose transaction the message is written, and ``ordering_key``: see `taskguard.outbox.Outbox`.
        Inside a transactional run that is the run's, unless ``session=False`` has the message sent at once.

        Returns the result of the task already queued where the task is unique and one is.
        """
        if session is False:
            with sending():
                return self.apply_async(
                    args, kwargs, task_id, producer, link, link_error, shadow, deadline=deadline,
                    idempotency_key=idempotency_key, **options,
                )  # fmt: skip
        if session is not None and not transactional.own_session(get_current_task(), session):
            from taskguard.outbox import send_in

            more = {"link": link, "link_error": link_error, "shadow": shadow, "deadline": deadline}
            more |= {"idempotency_key": idempotency_key, **options}
            return send_in(
                session, self.app, lambda stand_in: self.apply_async(args, kwargs, task_id, stand_in, **more)
            )
        self._stamp_options(options, deadline, idempotency_key)
        token = queued_instead.set(None)
        try:
            result = super().apply_async(args, kwargs, task_id, producer, link, link_error, shadow, **options)
            queued = queued_instead.get()
        finally:
            queued_instead.reset(token)
        return result if queued is None else self.AsyncResult(queued)

    def delay_with(self, session: Any, *args: Any, **kwargs: Any) -> Any:
        """Celery's ``delay``, sent if and only if the transaction of *session* commits."""
        return self.apply_async(args, kwargs, session=session)

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Celery's ``apply``: runs here and now, through the gate as in a worker."""
        self._stamp_options(options, options.pop("deadline", None), options.pop("idempotency_key", None))
        own_headers = {**(options.get("headers") or {}), "expires": options.pop("expires", None)}
        stamp_deadline(self, own_headers)
        del own_headers["expires"]
        options["headers"] = own_headers
        return super().apply(args, kwargs, **options)

    def _stamp_options(
        self, options: dict[str, Any], deadline: Duration | datetime | None, idempotency_key: str | None
    ) -> None:
        given = dict(options.get("headers") or {})
        stamp = stamp_call(given, self.name, deadline, idempotency_key)
        if stamp:
            options["headers"] = given | stamp

    def AsyncResult(self, task_id: str, **options: Any) -> AsyncResult:
        """Celery's result handle."""
        return super().AsyncResult(task_id, **options)


def _caller_signature(cls: type[ReliableTask]) -> inspect.Signature | None:
    """The signature of the body as callers see it, without ``self``; None where there is no body yet."""
    cached = cls.__dict__.get("_signature")
    if isinstance(cached, inspect.Signature):
        return cached
    body = inspect.getattr_static(cls, "run")
    if body is inspect.getattr_static(Task, "run"):
        return None
    static = isinstance(body, staticmethod)
    signature = inspect.signature(body.__func__ if static else body)
    if not static:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    cls._signature = signature
    return signature


def _check(cls: type[ReliableTask]) -> None:
    """Fail where the task is declared, not in the worker at night."""
    name = cls.name or cls.__name__
    for option, choices in cls._choices.items():
        value = getattr(cls, option)
        if value not in choices:
            raise ConfigurationError(f"{name}: {option}={value!r} is not one of {', '.join(map(repr, choices))}")
    for option in ("acks_late", "acks_on_failure", "acks_on_timeout", "acks_on_failure_or_timeout"):
        if not getattr(cls, option):
            raise ConfigurationError(
                f"{name}: {option}=False would lose the message or run it in a loop; leave it out, custody settles it"
            )
    for option in ("retention", "unique_for"):
        value = getattr(cls, option)
        if value is not None and seconds(value, what=f"{name}: {option}") <= 0:
            raise ConfigurationError(f"{name}: {option}={value!r} must be more than zero seconds, or left out")
    if cls.deadline is not None:
        instant(cls.deadline, now=wall_clock(), what=f"{name}: deadline")
    if cls.max_crashes is not None and (not isinstance(cls.max_crashes, int) or cls.max_crashes < 1):
        raise ConfigurationError(f"{name}: max_crashes={cls.max_crashes!r} must be a whole number, 1 or more")
    for option in vars(cls).keys() - vars(Task).keys() - ReliableTask.options():
        near = get_close_matches(option, ReliableTask.options(), n=1, cutoff=0.85)
        if near:
            warnings.warn(f"{name}: option {option!r} is not known; is {near[0]!r} meant?", stacklevel=4)
    cls._downstreams = declared_downstreams(inspect.getattr_static(cls, "downstream"), task=name)
    signature = _caller_signature(cls)
    if signature is not None:
        declared = inspect.getattr_static(cls, "idempotency_key")
        cls._identity = declared_identity(inspect.getattr_static(cls, "limited"), signature, task=name)
        cls._key_maker = key_maker(
            declared.__func__ if isinstance(declared, staticmethod) else declared, signature, task=name
        )
