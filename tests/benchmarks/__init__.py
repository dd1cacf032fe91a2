"""Benchmarks: both sides interleaved in one run, ratios of medians, an A/A control beside them. ``make bench``."""
