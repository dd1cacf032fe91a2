"""An application whose store is a SQLite file, with no broker and no result backend in reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import create_engine

from taskguard import install
from taskguard.stores.sql import SQLStore

NOWHERE = "redis://127.0.0.1:1/0"
"""Nobody answers: what asks the broker or the result backend fails."""


class SQLShop:
    """The application, and the store as a test sees it."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.url = f"sqlite:///{path}"
        self.app = Celery("shop", broker=NOWHERE, backend=NOWHERE, set_as_current=False)
        install(self.app, **{"store": self.url, "namespace": "shop", **settings})
        self.store: Any = SQLStore.from_url(self.url, namespace="shop")
        self.engine = create_engine(self.url)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.store.close()
        self.app.taskguard.store.close()
