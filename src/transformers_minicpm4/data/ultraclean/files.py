"""Files that are there whole or not at all."""

import json
import os
from pathlib import Path


def rename(temporary: Path, target: Path) -> None:
    """Give a finished file its name."""
    # The bytes reach the disk before the name does: a rename that survives a power cut must not name an empty file.
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, target)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, the folder too if need be; of several processes at one file the last one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    rename(temporary, path)


def write_json(path: Path, content) -> None:
    """Write `content` as JSON that a person can read."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
