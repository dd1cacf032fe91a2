"""Sending inside a database transaction: a task is sent if, and only if, the transaction commits.

What Celery would publish is written as rows of the message store's table, with the caller's own connection; a relay
publishes it after the commit. Nothing is said to the broker or the result backend before, so that neither can hold up
or fail a transaction, and a rollback leaves nothing behind.
"""

from taskguard.outbox.sending import Outbox, send_in

__all__ = ["Outbox", "send_in"]
