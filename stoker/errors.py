"""Errors that speak to the user."""

from __future__ import annotations


class Refusal(ValueError):
    """What was asked cannot be done; nothing was written or lost. The message names the file, key or rank and says
    what to do. Every command turns it into one line and exit code 2."""
