"""Shipping: the carrier takes 50 labels a second from all of us together, refuses more, and is down now and then.

The declaration is all there is to it. Each label has its turn at the declared rate, whichever worker makes it; more
than that rests in the store and spends no attempt. While the carrier is down its labels are parked, and one of them
finds out now and then whether it is back. They then come back slowly at first.
"""

from __future__ import annotations

import json
import os
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from taskguard import ReliableTask, Retry
from taskguard.downstream.service import Downstream
from taskguard.policies import CircuitBreaker, Concurrency, TokenBucket
from workers.app import app


class CarrierUnavailable(ConnectionError):
    """The carrier is down, busy or out of reach."""


carrier = Downstream(
    "carrier",
    # In any second at most 42 + 4, and one call of each process that was under way: 50 for four of them.
    rate=TokenBucket(42, burst=4),
    concurrency=Concurrency(10, lease=20),
    circuit=CircuitBreaker(
        minimum_calls=5, wait_in_open=2, backoff=1.5, max_wait_in_open=30, slow_start=5, expected=(CarrierUnavailable,)
    ),
)


@app.task(
    base=ReliableTask, idempotency_key="label:{order_id}", deadline=86400, downstream=carrier,
    retry=Retry(max_retries=5, first_delay=1.0),
)  # fmt: skip
def label(order_id: str) -> str:
    """Have a parcel's label made."""
    url = os.environ.get("CARRIER_URL", "http://127.0.0.1:8081") + "/labels"
    try:
        with urlopen(Request(url, data=json.dumps({"order_id": order_id}).encode()), timeout=10) as answer:
            return str(json.load(answer)["label"])
    except HTTPError as exc:
        raise CarrierUnavailable(f"the carrier answered {exc.code} for order {order_id}") from None
    except (OSError, HTTPException) as exc:
        raise CarrierUnavailable(f"{url}: {exc}") from exc
