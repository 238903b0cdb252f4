"""What goes wrong in the laptop cluster, told so that a user can act."""

from __future__ import annotations


class LocalClusterError(Exception):
    """A failure with a remedy; `str()` gives both."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message if not remedy else f"{message}\n{remedy}")
        self.message = message
        self.remedy = remedy
