"""The application that the workers of these tests run: ``celery -A tests.integration.app worker``."""

from __future__ import annotations

import os

from tests.integration.tasks import make_app

app = make_app(os.environ)
