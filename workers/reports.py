"""Reports: a long task. Its lease is renewed by the worker's heartbeat for as long as it runs.

No visibility timeout can bring a second copy to life meanwhile, and a killed worker's report is begun again within
seconds of its lease's end.
"""

from __future__ import annotations

import time

from taskguard import ReliableTask
from taskguard.errors import CustodyLost
from workers.app import app


@app.task(bind=True, base=ReliableTask, idempotency_key="report:{month}", deadline=3600)
def monthly(self: ReliableTask, month: str, *, pages: int = 60, seconds_per_page: float = 1.0) -> str:
    """Draw up a month's report, page by page."""
    for page in range(1, pages + 1):
        if self.custody_lost:
            raise CustodyLost(f"report {month}: another worker has taken it over at page {page}; this copy stops")
        time.sleep(seconds_per_page)
        self.update_state(state="PROGRESS", meta={"page": page, "of": pages})
    return f"{month}: {pages} pages"
