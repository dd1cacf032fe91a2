"""The tests of taskguard."""
