"""A guarded adapter for requests: ``session.mount("https://bank.example", GuardedAdapter(bank))``.

As `clients.httpx`, with what requests allows: a body that is not streamed is read within the permit, a streamed one
(``stream=True``) after it; and a read timeout bounds each wait for bytes, not their sum, so a server that trickles may
outlast the total by what it trickles. The total is checked again when the body is there.
"""

from __future__ import annotations

from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from taskguard.clients import budgets
from taskguard.clock import wall_clock
from taskguard.downstream.answers import read
from taskguard.downstream.service import Downstream


class GuardedAdapter(HTTPAdapter):
    """Guards every request of the session's that it is mounted for. Further options are HTTPAdapter's."""

    def __init__(self, downstream: Downstream, **options: Any) -> None:
        self._downstream = downstream
        super().__init__(**options)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float | None, float | None] | None = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: dict[str, str] | None = None,
    ) -> requests.Response:
        downstream = self._downstream
        url = urlsplit(request.url or "")
        known = {"method": request.method or "", "host": url.hostname or "", "path": url.path, "url": request.url or ""}
        with downstream.permit(kwargs=known, covers=False) as block:
            left = budgets.allowed(downstream.timeout)
            began = monotonic()
            connect, wait = timeout if isinstance(timeout, tuple) else (timeout, timeout)
            bounds = (
                budgets.bounded(connect, downstream.timeout, "connect", left),
                budgets.bounded(wait, downstream.timeout, "read", left),
            )
            request.headers.update(budgets.sent_on(left))
            try:
                response = super().send(
                    request, stream=stream, timeout=bounds, verify=verify, cert=cert, proxies=proxies
                )
                block.answered(read(response.status_code, response.headers, now=wall_clock()))
                if not stream:
                    response.content  # noqa: B018 (a property that reads)
                    if left is not None and monotonic() - began > left:
                        response.close()
                        raise requests.exceptions.ReadTimeout(
                            f"{downstream.name}: the body took longer than the {left:.3g} s of the budget",
                            request=request,
                        )
            except Exception as exc:
                downstream.tries.count(exc)
                if isinstance(exc, requests.exceptions.RequestException):
                    block.failed()
                raise
            return response
