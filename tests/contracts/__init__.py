"""What every message store promises: one promise per test, every backend, expectations written by hand."""
