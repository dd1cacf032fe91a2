"""The proof: every known hazard of Celery, fired at taskguard and at stock Celery alike.

A row is one hazard. ``pytest tests/proof`` plays each once, with taskguard, somewhere drawn by a printed seed;
``python -m tests.proof`` plays all of them everywhere, with stock Celery beside taskguard, and prints what became of
the tasks.
"""
