"""``python -m taskguard``: the command line, where no script is installed."""

from taskguard.cli import main

main()
