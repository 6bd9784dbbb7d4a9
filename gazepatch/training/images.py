"""Images of a record, however it holds them: a path, a `file:` or `data:` URL, bytes, or an image that is open."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import url2pathname

from gazepatch.errors import TrainingError
from gazepatch.pictures import read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "file://"


def check_image(given: Any, folder: Path, where: str) -> None:
    """Refuse what cannot be opened, without opening it.

    Args:
        given: The image as the record holds it.
        folder: What paths are relative to.
        where: Names the record.

    Raises:
        TrainingError: It is no image, or its file is missing.
    """
    if not isinstance(source := _source(given), (str, bytes, Path)):
        if hasattr(source, "convert"):
            return
        raise TrainingError(
            f"{where}: an image must be a path, a data: URL or {{'bytes': base64}}, got {type(given).__name__}"
        )
    if isinstance(source, bytes) or _is_data(source):
        return
    if str(source).startswith(FILE):
        raise TrainingError(f"{where}: a file: URL must be {FILE}/ and a whole path, got {source}")
    if "://" in str(source):
        raise TrainingError(f"{where}: images are not fetched from the network, got {source}: download it first")
    if not (folder / source).is_file():
        raise TrainingError(f"{where}: no image at {folder / source}; paths are relative to the file of the records")


def open_image(given: Any, folder: Path, where: str) -> Image:
    """The image, in RGB.

    Raises:
        TrainingError: It cannot be decoded.
    """
    check_image(given, folder, where)
    source = _source(given)
    if hasattr(source, "convert"):
        opened: Image = source.convert("RGB")
        return opened
    try:
        held = _bytes(source)
        return read_picture(folder / source if held is None else io.BytesIO(held))
    except ValueError as error:
        raise TrainingError(f"{where}: an image cannot be read: {error}") from None


def _source(given: Any) -> Any:
    """What is inside `{"path": ...}` and `{"bytes": ...}`, the way `datasets` keeps images, and in a `file:` URL."""
    if isinstance(given, dict):
        held = given.get("bytes")
        if held is not None:
            return f"data:;base64,{held}" if isinstance(held, str) else held
        given = given.get("path") or given.get("url")
    return _path(given) if isinstance(given, str) and given.startswith(FILE) else given


def _path(url: str) -> str:
    """The path of a `file:` URL on this machine; of one on another, the URL."""
    path = url[len(FILE) :].removeprefix("localhost")
    return url2pathname(path) if path.startswith("/") else url


def _is_data(source: Any) -> bool:
    return isinstance(source, str) and source.startswith("data:")


def _bytes(source: Any) -> bytes | None:
    """The bytes that a source holds itself; None for a path."""
    if isinstance(source, bytes):
        return source
    if not _is_data(source):
        return None
    try:
        return base64.b64decode(source.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is damaged ({error})") from None
