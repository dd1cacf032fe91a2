"""Mutation testing by hand: see ``__main__``."""
