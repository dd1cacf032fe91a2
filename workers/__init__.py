"""Runnable Celery workers: the tested examples, and what `taskguard demo` runs."""
