"""Rates, lines, places and circuits as pure functions: the specification of every permit store."""
