"""Variables of the environment. A value that cannot be used is told with its name and with what it may be."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit


class ConfigurationError(Exception):
    """A variable of the environment is missing or wrong; the message names it and says what it may be."""


class Variables:
    """Reads one after the other. An empty one counts as not set. Raises ConfigurationError."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def raw(self, name: str) -> str:
        """As it is; empty where it is not set."""
        return self._environ.get(name, "")

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        text = self.raw(name).strip()
        try:
            value = float(text) if text else default
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ConfigurationError(f"{name}={text!r}: must be a number from {low:g} to {high:g}")
        return value

    def whole(self, name: str, default: int, *, low: int, high: int) -> int:
        value = self.number(name, default, low=low, high=high)
        if value != int(value):
            raise ConfigurationError(f"{name}={self.raw(name).strip()!r}: must be a whole number")
        return int(value)

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.raw(name) or default
        if value not in allowed:
            raise ConfigurationError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
        return value

    def text(self, name: str, default: str, *, pattern: str, what: str) -> str:
        text = self.raw(name) or default
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ConfigurationError(f"{name}={text!r}: must be {what}")
        return text

    def address(self, name: str) -> str | None:
        text = self.raw(name) or None
        try:
            return text and str(ipaddress.ip_address(text))
        except ValueError:
            raise ConfigurationError(f"{name}={text!r}: must be an IP address such as 10.0.0.7") from None

    def file(self, name: str) -> Path | None:
        text = self.raw(name)
        if not text:
            return None
        if not Path(text).is_file():
            raise ConfigurationError(f"{name}={text!r}: no such file")
        return Path(text)

    def urls(self, name: str) -> tuple[str, ...]:
        urls = [url.strip().rstrip("/") for url in self.raw(name).split(",") if url.strip()]
        for url in urls:
            if not is_url(url) or re.search("[?#]", url):  # a path is put behind it
                raise ConfigurationError(f"{name}={url!r}: must be a URL such as http://finetune-router:8081")
        return tuple(urls)

    def url(self, name: str) -> str | None:
        urls = self.urls(name)
        if len(urls) > 1:
            raise ConfigurationError(f"{name}={self.raw(name)!r}: must be one URL")
        return urls[0] if urls else None


def is_url(url: object) -> bool:
    """Whether it is one of http or https with a host."""
    if not isinstance(url, str) or re.search(r"\s", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
