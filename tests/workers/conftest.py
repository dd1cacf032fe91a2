"""The example workers on stage, beside a real bank in this process."""

from __future__ import annotations

import pytest
from celery import Celery

from workers.app import app


@pytest.fixture
def taskguard_app() -> Celery:
    """The application under test; the suite has many others."""
    return app
