"""The command line. Each command imports what it needs when it is called, so that `--help` is instant."""

from flows.cli.app import main

__all__ = ["main"]
