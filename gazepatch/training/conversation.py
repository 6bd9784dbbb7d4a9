"""One conversation about images, out of its JSON: see `gazepatch.training.records` for the forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gazepatch.errors import TrainingError
from gazepatch.training.images import check_image

MARK, VIDEO_MARK, VIDEO_KEYS = "<image>", "<video>", ("videos", "video")
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names for them

Message = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: Names it in errors.
        messages: Each with its role, and its content as a list of texts and images, `{"type": "image"}`.
        images: In the order of those, as they were given.
        folder: What paths are relative to.
        keys: Of its JSON.
    """

    where: str
    messages: list[Message]
    images: list[Any]
    folder: Path
    keys: tuple[str, ...] = ()


def record(values: Any, where: str, folder: Path) -> Record:
    """A record out of its JSON.

    Raises:
        TrainingError: It is broken.
    """
    if not isinstance(values, dict):
        raise TrainingError(f"{where}: a record must be a JSON object, got {type(values).__name__}")
    given = values.get("messages", values.get("conversations"))
    if not isinstance(given, (list, tuple)) or not given:
        raise TrainingError(
            f"{where}: expected a list 'messages' (or LLaVA's 'conversations'), got the keys {', '.join(values)}"
        )
    for key in VIDEO_KEYS:
        if values.get(key):  # sets with a column for videos may have none in it
            raise _no_videos(where, f"the key {key!r}")
    found: list[Any] = []
    messages = [_message(message, number, where, found) for number, message in enumerate(given)]
    _check_roles(messages, where)
    images = _images(values, where)
    if images and not found:  # no place was named: before the first question
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"][:0] = [{"type": "image"} for _ in images]
        found = [None] * len(images)
    if any(image is not None for image in found):
        if images or None in found:
            raise TrainingError(f"{where}: images must be all in 'images' or all in the messages, got both")
        images = found
    if len(images) != len(found):
        raise TrainingError(f"{where}: expected an image for each of {len(found)} places, got {len(images)}")
    for image in images:
        check_image(image, folder, where)
    return Record(where, messages, images, folder, tuple(values))


def _check_roles(messages: list[Message], where: str) -> None:
    """Refuse a conversation without answers, with one before any question, or with one that is not just text."""
    answers = {number: message for number, message in enumerate(messages) if message["role"] == "assistant"}
    if not answers:
        raise TrainingError(f"{where}: expected a message of the assistant to learn from, got none")
    if 0 in answers:
        raise TrainingError(f"{where}: expected a question first, got a message of the assistant: remove it")
    for number, message in answers.items():
        drawn = any(part["type"] == "image" for part in message["content"])
        if drawn or not any(part["text"].strip() for part in message["content"]):
            got = "an image" if drawn else "none"
            raise TrainingError(
                f"{where}: expected text of the assistant in message {number}, got {got}: drop the record"
            )


def _message(given: Any, number: int, where: str, found: list[Any]) -> Message:
    """A message in the form of `Record`; what its places hold is added to `found`, None for a bare place."""
    if not isinstance(given, dict):
        raise TrainingError(f"{where}: message {number} must be an object, got {type(given).__name__}")
    role = given.get("role", given.get("from"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or not role:
        raise TrainingError(f"{where}: message {number} must have a 'role', got the keys {', '.join(given)}")
    content = given.get("content", given.get("value"))
    if isinstance(content, str):
        if VIDEO_MARK in content:
            raise _no_videos(where, f"{VIDEO_MARK} in message {number}")
        texts = content.split(MARK)
        parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
    elif isinstance(content, (list, tuple)):
        parts = list(content)
    else:
        raise TrainingError(
            f"{where}: message {number} must have 'content', a string or a list, got {type(content).__name__}"
        )
    kept = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if part["text"]:
                kept.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            kept.append({"type": "image"})
            found.append(next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None))
        else:
            raise TrainingError(
                f"{where}: message {number} may hold {{'type': 'text', 'text': ...}} and {{'type': 'image'}}, "
                f"got {str(part)[:80]}"
            )
    return {"role": role, "content": kept or [{"type": "text", "text": ""}]}  # templates look at the first part


def _no_videos(where: str, got: str) -> TrainingError:
    return TrainingError(f"{where}: expected images only, got {got}: give frames as images, or drop the record")


def _images(values: dict[str, Any], where: str) -> list[Any]:
    images = values.get("images", values.get("image"))
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (int, float)):
        raise TrainingError(f"{where}: images must be a list, got {images!r}")
    return [images]
