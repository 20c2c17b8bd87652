"""Paths as others may see them: in cards and in the JSON files beside them."""

import re
from pathlib import Path


def shown_path(name: str) -> str:
    """A path from the working directory, or, of what is elsewhere on this machine, its name."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return path.name if path.is_absolute() or ".." in path.parts else name


def shown_text(text: str) -> str:
    """Words in which paths of this machine are shown by `shown_path`; addresses (https://...) stay."""
    return re.sub(r"(?<![\w:/<.~-])/[^\s'\"`,;:()|<>]+", lambda match: shown_path(match[0]), text)
