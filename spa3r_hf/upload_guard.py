"""A guard before a web app: refuses what would fill memory or disk, before it is read."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)


class UploadGuard:
    """
    ASGI middleware: bounds the bodies of requests, and the disk that uploaded files take, whoever sends what.

    Args:
        app: What it stands before, such as a Gradio app: `launch(app_kwargs={"middleware": [...]})`.
        folder: Where uploaded files are stored.
        max_upload_bytes: Of a request to a path that ends in "/upload".
        max_stored_bytes: Of all files in the folder, beyond which there are no uploads.
        max_other_bytes: Of any other request.
    """

    def __init__(
        self,
        app: Callable,
        folder: Path,
        max_upload_bytes: int = 200_000_000,
        max_stored_bytes: int = 2_000_000_000,
        max_other_bytes: int = 1_000_000,
    ):
        self.app = app
        self.folder = folder
        self.max_upload_bytes = max_upload_bytes
        self.max_stored_bytes = max_stored_bytes
        self.max_other_bytes = max_other_bytes

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(send, 411, "The request does not say its size.")
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        most = self.max_upload_bytes if is_upload else self.max_other_bytes
        if int(length) > most:
            return await _refuse(send, 413, f"{int(length) / 1e6:.1f} MB at once; expected at most {most / 1e6:g} MB.")
        if is_upload and _size_of(self.folder) > self.max_stored_bytes:
            return await _refuse(send, 507, "No more files can be stored now; try again in some minutes.")
        return await self.app(scope, receive, send)


async def _refuse(send: Callable, status: int, message: str) -> None:
    logger.warning("a request was refused: %s", message)
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain; charset=utf-8")]}
    )
    await send({"type": "http.response.body", "body": message.encode()})


def _size_of(folder: Path) -> int:
    """Bytes of all files in a folder; those that go away meanwhile do not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


__all__ = ["UploadGuard"]
