"""Hostile input: what the fuzzers share. Nothing here imports atheris but the harness that needs it."""
