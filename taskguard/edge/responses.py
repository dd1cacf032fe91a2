"""What a decision looks like over HTTP: the fields of an answer, and the whole answer of a refusal.

Source: draft-ietf-httpapi-ratelimit-headers-10 (27 September 2025): ``RateLimit-Policy`` lists every limit that was
looked at, ``RateLimit`` how each stands; both are structured fields (RFC 9651). A window is in whole seconds there, so
a limit of less than a second is told for one second. Problem documents: RFC 9457; the types are those of the draft.
"""

from __future__ import annotations

import json
from math import ceil, floor

from taskguard.limiter.decision import Decision, Standing
from taskguard.policies.rates import Rate, TokenBucket

Field = tuple[str, str]
LARGEST = 999_999_999_999_999
"""The largest integer of a structured field."""
TYPES = "https://iana.org/assignments/http-problem-types#"
PROBLEM = "application/problem+json"


def retry_after(decision: Decision) -> int | None:
    """``Retry-After``: whole seconds, rounded up, 1 at least; None where waiting does not help."""
    wait = decision.retry_after if decision.slot_in is None else decision.slot_in
    return None if decision.allowed or wait is None else min(LARGEST, max(1, ceil(wait)))


def fields(decision: Decision) -> list[Field]:
    """The fields that an answer carries, refused or not."""
    policies, standings = [], []
    wait = retry_after(decision)
    for each in decision.standings:
        name = f'"{_policy_name(each)}"'  # of a rule's id nothing has to be escaped
        policies.append(f"{name};{_policy(each.rate)}")
        refused = not decision.allowed and each.view.name == decision.limit
        left = 0 if refused else _integer(floor(each.view.remaining + 1e-9))
        reset = wait if refused and wait is not None else _integer(ceil(each.view.reset_after - 1e-9))
        standings.append(f"{name};r={left};t={reset}")
    found: list[Field] = []
    if policies:
        found += [("RateLimit-Policy", ", ".join(policies)), ("RateLimit", ", ".join(standings))]
    if wait is not None:
        found.append(("Retry-After", str(wait)))
    return found


def refusal(decision: Decision) -> tuple[int, list[Field], bytes]:
    """The answer to a call that was refused: 429, or 503 where it could not be checked; its fields and its body."""
    if decision.store_down or decision.crowded:
        status, title, kind = 503, "Limits cannot be checked now", "temporary-reduced-capacity"
        detail = "Calls are refused until they can be checked; come again after Retry-After."
    else:
        status, title, kind = 429, "Too many requests", "quota-exceeded"
        detail = (
            "This call costs more than its limit can ever admit; ask for less at once."
            if decision.retry_after is None
            else "The limit is used up; come again after Retry-After."
        )
    violated = [_policy_name(each) for each in decision.standings if each.view.name == decision.limit]
    problem = {
        "type": f"{TYPES}{kind}",
        "title": title,
        "status": status,
        "detail": detail,
        "violated-policies": violated,
    }
    body = json.dumps(problem).encode()
    about = [("Content-Type", PROBLEM), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
    return status, [*about, *fields(decision)], body


def _policy_name(standing: Standing) -> str:
    """The rule's id; of a rule of several limits, with the number of this one."""
    rule = standing.rule
    return rule.id if len(rule.limits) == 1 else f"{rule.id}-{rule.limits.index(standing.rate) + 1}"


def _policy(rate: Rate) -> str:
    """``q`` permits per ``w`` seconds, and the burst where it is another number."""
    if rate.limit < 1:
        quota, window = 1, ceil(rate.interval - 1e-9)
    elif rate.period < 1:
        quota, window = floor(rate.limit / rate.period + 1e-9), 1
    else:
        quota, window = floor(rate.limit), ceil(rate.period - 1e-9)
    text = f"q={_integer(quota)};w={_integer(window)}"
    if isinstance(rate, TokenBucket) and rate.burst != rate.limit:
        text += f";taskguard-burst={_integer(floor(rate.most))}"
    return text


def _integer(value: int) -> int:
    return min(LARGEST, max(0, value))
