"""Programs that stand in for those that want a GPU."""

import shlex
import sys
from pathlib import Path


def program(path: Path, text: str) -> Path:
    """A Python script that can be called by its name; Python's own path may hold spaces."""
    script = path.with_name(path.name + ".py")
    script.write_text(text)
    path.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n'
    )
    path.chmod(0o755)
    return path
