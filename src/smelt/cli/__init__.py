"""The command line: one file a command. Nothing heavy is imported before a command runs, so that --help is instant."""

from .app import app, main

__all__ = ["app", "main"]
