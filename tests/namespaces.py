"""User namespaces of Linux, which some machines and most containers forbid (user_namespaces(7))."""

from __future__ import annotations

import functools
import subprocess


@functools.cache
def are_allowed() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        return False
