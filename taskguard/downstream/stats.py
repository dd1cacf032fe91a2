"""What a process saw of a downstream: figures for metrics, and lines for people."""

from __future__ import annotations

from dataclasses import dataclass

from taskguard.clock import seconds
from taskguard.downstream.guarding import Guard
from taskguard.policies.adaptive import Adaptive
from taskguard.policies.calls import Fallback, Limit, Timeout
from taskguard.policies.circuit import CircuitState
from taskguard.policies.retry import Retry


@dataclass(frozen=True, slots=True, kw_only=True)
class DownstreamStats:
    """What this process saw of one downstream. Named as the metrics are; None where the part is not declared.

    Durations are not measured where a circuit is all that is declared and its function is decorated: the closed path
    reads no clock. bulkhead_*: a fleet's free places are known to its store alone, so there ``available_permits`` is
    what this process leaves free.
    """

    downstream: str
    circuit_breaker_state: CircuitState | None = None
    circuit_breaker_failures_total: int = 0
    circuit_breaker_success_total: int = 0
    circuit_breaker_rejected_total: int = 0
    retry_attempts_total: int = 0
    retry_exhausted_total: int = 0
    request_timeout_total: int = 0
    request_duration_seconds_count: int = 0
    request_duration_seconds_sum: float = 0.0
    request_duration_seconds_buckets: tuple[tuple[float, int], ...] = ()
    bulkhead_available_permits: int | None = None
    bulkhead_active: int = 0
    bulkhead_waiting: int = 0
    bulkhead_rejected_total: int = 0
    bulkhead_lost_total: int = 0
    rate_limit_total: int = 0
    rate_limit_rejected_total: int = 0
    fallback_total: int = 0
    store_down_total: int = 0
    shadow_refused_total: int = 0


def stats(guard: Guard) -> DownstreamStats:
    """The figures as they stand."""
    tallies, circuit, slots, concurrency = guard.tallies, guard.circuit, guard.slots, guard.concurrency
    declared = circuit if guard.declared else None
    many, total, buckets = tallies.durations.read()
    active = guard.active()
    return DownstreamStats(
        downstream=guard.name,
        circuit_breaker_state=None if declared is None else declared.state,
        circuit_breaker_failures_total=0 if declared is None else declared.failed.total(),
        circuit_breaker_success_total=0 if declared is None else declared.successes(),
        circuit_breaker_rejected_total=0 if declared is None else declared.rejected.total(),
        retry_attempts_total=tallies.retries.total(),
        retry_exhausted_total=tallies.exhausted.total(),
        request_timeout_total=tallies.timeouts.total(),
        request_duration_seconds_count=many,
        request_duration_seconds_sum=total,
        request_duration_seconds_buckets=buckets,
        bulkhead_available_permits=None if concurrency is None else max(0, concurrency.limit - active),
        bulkhead_active=active,
        bulkhead_waiting=0 if slots is None else slots.waiting,
        bulkhead_rejected_total=tallies.slot_refused.total(),
        bulkhead_lost_total=tallies.slots_lost.total(),
        rate_limit_total=tallies.asked.total(),
        rate_limit_rejected_total=tallies.rate_refused.total(),
        fallback_total=tallies.fallbacks.total(),
        store_down_total=tallies.store_down.total(),
        shadow_refused_total=tallies.shadowed.total(),
    )


def explain(guard: Guard, *, retry: Retry | None, timeout: Timeout | None, fallback: Fallback | None) -> list[str]:
    """What is declared, in the order in which it is asked, and how it stands."""
    now = stats(guard)
    lines = [f"downstream {guard.name}{', a shadow: it refuses nothing' if guard.shadow else ''}"]
    if fallback is not None:
        chain = ", then ".join(part.kind for part in fallback.parts)
        lines.append(f"fallback: {chain}; gave {now.fallback_total} answers")
    if guard.circuit is not None and (guard.declared or guard.circuit.state != "closed"):
        lines.append(_circuit(guard, now))
    lines += [_limit(guard, limit) for limit in guard.limits]
    if guard.limits:
        lines.append(f"rates: refused {now.rate_limit_rejected_total} of {now.rate_limit_total} calls")
    if guard.concurrency is not None:
        where = "this process" if guard.concurrency.local else "the fleet"
        lines.append(
            f"bulkhead: {guard.concurrency.limit} calls at once in {where}; {now.bulkhead_active} under way here, "
            f"refused {now.bulkhead_rejected_total}, lost {now.bulkhead_lost_total}"
        )
    if retry is not None:
        most = "any number" if retry.max_retries is None else str(retry.max_retries)
        lines.append(f"retry: {most} retries in the call; {now.retry_attempts_total} made")
    if timeout is not None:
        parts = [
            f"{name} {seconds(value):g} s" for name in ("connect", "read", "total") if (value := getattr(timeout, name))
        ]
        ends = (
            "" if timeout.total is None or timeout.thread else " (sync code ends by itself, and has failed when late)"
        )
        lines.append(f"timeout: {', '.join(parts)}{ends}; {now.request_timeout_total} were over")
    outage = guard.desk().store.outage
    if outage.since is not None:
        fate = "let through" if guard.on_store_down == "allow" else "refused"
        lines.append(f"permit store: down ({outage.reason}); calls are {fate} meanwhile")
    return lines


def _circuit(guard: Guard, now: DownstreamStats) -> str:
    assert guard.circuit is not None
    view = guard.circuit.view
    why = f" ({view.why})" if view.why else ""
    left = guard.circuit.refused_for()
    again = "" if left is None or left == float("inf") else f", asked again in {left:.3g} s"
    return (
        f"circuit: {view.state.replace('_', ' ')}{why}{again}; here {now.circuit_breaker_failures_total} failed, "
        f"{now.circuit_breaker_success_total} went well, {now.circuit_breaker_rejected_total} were refused"
    )


def _limit(guard: Guard, limit: Limit) -> str:
    policy = limit.policy
    each = "" if limit.key is None else f" for each {limit.key if isinstance(limit.key, str) else 'key'}"
    if isinstance(policy, Adaptive):
        stands = guard.tuned(limit.name)
        between = f"between {policy.least:g} and {policy.most:g}"
        return (
            f"rate {limit.name}: {stands:g} per {policy.period:g} s, adapting {between}; {guard.why_tuned(limit.name)}"
        )
    return f"rate {limit.name}: {type(policy).__name__}, {policy.limit:g} per {policy.period:g} s{each}"
