"""The Celery adapter: where the domain hooks into producers and workers."""
