"""The ids of linked tasks, fixed when a message is sent: what is published twice after a crash is then known as one."""

from __future__ import annotations

import uuid
from copy import deepcopy
from typing import Any

from celery import Celery, signature
from kombu.utils.functional import maybe_list

LINKS = uuid.UUID("6f7c2f0e-3c53-4f5e-9d59-3a0f0f6b8a51")
"""The name space of the ids of links that are made from the id of what they are linked to."""


def with_task_ids(app: Celery, embed: dict[str, Any]) -> dict[str, Any]:
    """Fix the ids of linked tasks now, so that a link published twice after a crash is recognised as one task.

    The steps of a chain and the body of a chord have their ids already; what is linked to them has not.
    """
    fixed = dict(embed)
    for part in ("callbacks", "errbacks"):
        if embed.get(part):
            fixed[part] = [_with_task_id(app, each, None) for each in embed[part]]
    if embed.get("chain"):
        fixed["chain"] = [_with_linked_ids(app, step) for step in embed["chain"]]
    if embed.get("chord"):
        fixed["chord"] = _with_linked_ids(app, embed["chord"])
    return fixed


def _with_task_id(app: Celery, callback: Any, task_id: str | None) -> Any:
    fixed = _with_linked_ids(app, callback)
    fixed.freeze(task_id)
    return fixed


def _with_linked_ids(app: Celery, step: Any) -> Any:
    """*step* with ids for its links, made from its own: each member of a chord carries the body, and any may send."""
    fixed = signature(deepcopy(dict(step)), app=app)
    own = fixed.options.get("task_id")
    for part in ("link", "link_error"):
        if fixed.options.get(part):
            fixed.options[part] = [
                _with_task_id(app, each, str(uuid.uuid5(LINKS, f"{own}/{part}/{index}")) if own else None)
                for index, each in enumerate(maybe_list(fixed.options[part]))
            ]
    return fixed
