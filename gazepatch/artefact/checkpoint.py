"""The files of a model's checkpoint: found, fingerprinted and copied or linked, without ever loading a weight."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gazepatch.errors import ArtefactError
from gazepatch.files import replace_file

CONFIG_NAME = "config.json"
WEIGHTS_SUFFIX = ".safetensors"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

TEMPLATES = "additional_chat_templates"

#: The settings of a processor, under its older names as well.
PROCESSORS = "*processor_config.json"

#: What transformers reads beside the weights: settings, tokenizer, processor, templates. No code, and no files of just
#: any name: whatever else lies in a folder may not be meant for others.
BESIDE = (
    CONFIG_NAME,
    "generation_config.json",
    PROCESSORS,
    "tokenizer*.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    f"{TEMPLATES}/*.jinja",
)
LICENCES = ("LICENSE*", "NOTICE*")

_CHUNK_BYTES = 1 << 26

# What the system says when it cannot copy between two files by itself.
_NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

Progress = Callable[[int, int], None]


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint in a folder, relative to it: weights as its index names them, and the rest.

    Code, pickles, states of optimisers and second copies of the weights in other formats are none of them.

    Raises:
        ArtefactError: There are no safetensors weights, or a shard is missing or damaged.
    """
    weights = weight_files(folder)
    index = [] if weights == [Path(WEIGHTS_NAME)] else [Path(INDEX_NAME)]
    return sorted({*weights, *index, *files_beside(folder)})


def files_beside(folder: Path) -> set[Path]:
    """What is in a folder beside the weights of its checkpoint, relative to it."""
    return {path.relative_to(folder) for name in (*BESIDE, *LICENCES) for path in folder.glob(name) if path.is_file()}


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name, with `/` between folders, is part of a checkpoint; licences may be anybody's."""
    patterns = (*BESIDE, WEIGHTS_NAME, INDEX_NAME, "model-*.safetensors")
    # As a shell matches: `*` does not reach into other folders.
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def weight_files(folder: Path) -> list[Path]:
    """Names of the safetensors files of a checkpoint, each of which is there.

    Raises:
        ArtefactError: There are none, or the index is damaged or names files that are missing.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return [Path(WEIGHTS_NAME)]
    if not (folder / INDEX_NAME).is_file():
        raise ArtefactError(
            f"expected {WEIGHTS_NAME} or {INDEX_NAME} in {folder}, got neither: weights in other formats are not "
            "taken along; save the model with save_pretrained first, or make an adapter folder (without full)"
        )
    shards = shards_of(folder / INDEX_NAME)
    if missing := [shard.name for shard in shards if not (folder / shard).is_file()]:
        raise ArtefactError(f"{folder} lacks {', '.join(missing)}, which its index names: get them again")
    return shards


def shards_of(index: Path) -> list[Path]:
    """Names of the safetensors files that the index of a checkpoint names.

    Raises:
        ArtefactError: The index is damaged.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [Path(name) for name in names]
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise ArtefactError(f"{index} must map tensors to shards in weight_map: {error!r}; get a new copy") from None
    if bad := [str(shard) for shard in shards if shard.name != str(shard) or shard.suffix != WEIGHTS_SUFFIX]:
        raise ArtefactError(f"{index} must name safetensors files beside it, got {', '.join(bad)}")
    if not shards:
        raise ArtefactError(f"{index} must name at least one shard, got none: get a new copy")
    return shards


def key_layout(folder: Path) -> str:
    """A fingerprint of the names and shapes of all tensors of a checkpoint, from the headers of its files alone.

    Raises:
        ArtefactError: As `weight_files`, or a file is not a valid safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    digest = hashlib.sha256()
    tensors: list[tuple[str, list[int]]] = []
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, framework="numpy") as file:
                tensors += [(key, list(file.get_slice(key).get_shape())) for key in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtefactError(f"{folder / name} is not a valid safetensors file: {error}; get a new copy") from None
    for tensor in sorted(tensors):
        digest.update(json.dumps(tensor).encode())
    return digest.hexdigest()


def known_layout(folder: Path) -> str | None:
    """`key_layout`, or None where the weights are in another format or elsewhere."""
    held = (folder / WEIGHTS_NAME).is_file() or (folder / INDEX_NAME).is_file()
    return key_layout(folder) if held else None


def copy_files(
    source: Path, target: Path, names: Iterable[Path], *, link: bool = False, progress: Progress | None = None
) -> None:
    """Put files of one folder into another, piece by piece, so that memory does not grow with them.

    Args:
        source: Where they are. Links (those of the Hub's cache) are followed.
        target: Where they shall be; none of them may exist there.
        names: Which, relative to `source`.
        link: Make hard links of the weights, where the file system can.
        progress: Called with the bytes done so far and those there are.

    Raises:
        OSError: The disk is full, or a file cannot be read.
    """
    files = [((source / name).resolve(), target / name) for name in names]
    total, done = sum(path.stat().st_size for path, _ in files), 0
    for path, copy in files:
        copy.parent.mkdir(parents=True, exist_ok=True)
        if link and copy.suffix == WEIGHTS_SUFFIX and _linked(path, copy):
            done += path.stat().st_size
            if progress is not None:
                progress(done, total)
            continue
        with path.open("rb") as reader, copy.open("xb") as writer:
            while moved := _move(reader.fileno(), writer.fileno()):
                done += moved
                if progress is not None:
                    progress(done, total)


def config_values(path: Path) -> dict[str, Any]:
    """What stands in the `config.json` of a checkpoint.

    Raises:
        ArtefactError: It is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike, and JSON nested without end
        raise ArtefactError(f"{path} must be a JSON object: {error}; get a new copy of the model") from None
    if not isinstance(values, dict):
        raise ArtefactError(f"{path} must be a JSON object, got {type(values).__name__}; get a new copy of the model")
    return values


def add_to_config(folder: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to the `config.json` of a checkpoint; the file is replaced at once."""
    path = folder / CONFIG_NAME
    # Never into the file itself, which may be a hard link to the source's.
    replace_file(path, json.dumps(config_values(path) | dict(entries), indent=2, ensure_ascii=False) + "\n")


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _move(reader: int, writer: int) -> int:
    """Copy the next piece between two open files, inside the kernel where it can; 0 at the end."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(reader, writer, _CHUNK_BYTES)
        except OSError as error:
            if error.errno not in _NOT_IN_KERNEL:
                raise
    piece = os.read(reader, _CHUNK_BYTES)
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(writer, rest) :]
    return len(piece)
