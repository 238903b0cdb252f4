"""The page about every command, from the commands themselves.

`python -m finetune_cli.reference --write [DIR]` (or --check [DIR]); DIR is docs/reference below the current folder.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

from finetune_operator.api import crds

FILE = "command-line.md"
NOTE = "<!-- Generated from operator/finetune_cli by `make crds`; do not edit. -->\n\n"


def render_page() -> str:
    """Markdown, by typer's own generator; it runs apart because it looks at the size of the terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "typer", "finetune_cli.__main__", "utils", "docs", "--name", "finetune"],
        env={**os.environ, "COLUMNS": "1000", "TERMINAL_WIDTH": "1000"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (html.unescape(line).rstrip() for line in done.stdout.splitlines())
    hidden = ("* `--install-completion`", "* `--show-completion`", "* `--help`")
    text = "\n".join(line for line in lines if not line.startswith(hidden))
    text = re.sub(r"\*\*Options\*\*:\n+(?=\*\*Commands|#|\Z)", "", text)
    text = re.sub(
        r"^(\* `[a-z-]+`): .*\.\.\.$", r"\1", text, flags=re.MULTILINE
    )  # cut by the generator; below in full
    return f"{NOTE}{text.strip()}\n"


if __name__ == "__main__":
    sys.exit(crds.run({FILE: render_page()}, folder=Path("docs/reference"), description=__doc__ or ""))
