"""The folder beside an artefact where its training keeps its checkpoints until it is done.

A checkpoint counts when its last file is there: whenever the training is killed, the newest one that is whole stays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.errors import TrainingError
from gazepatch.files import replace_file, writing
from gazepatch.locks import locked

if TYPE_CHECKING:
    from transformers import TrainingArguments

RUN_NAME = "run.json"
MARK_NAME = "complete"


def working_folder(out: Path) -> Path:
    """Where the training of an artefact keeps its checkpoints."""
    return out.with_name(f"{out.name}.work")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a working folder that is whole, if there is one."""
    whole = [checkpoint for checkpoint in _checkpoints(folder) if (checkpoint / MARK_NAME).is_file()]
    return whole[-1] if whole else None


class Work:
    """The working folder of a training.

    Args:
        out: The artefact to be.
        identity: What tells this training from others, in what JSON can hold, or as text.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out, self.folder, self.identity = out, working_folder(out), json.loads(json.dumps(identity, default=str))

    @contextmanager
    def entered(self, arguments: TrainingArguments) -> Iterator[Path | None]:
        """`open`, in a folder that the first of the processes that train as one has `held` for the block.

        Raises:
            ArtefactError: There can be no folder.
            TrainingError: It belongs to another training.
        """
        first = arguments.process_index == 0
        with ExitStack() as stack:
            with arguments.main_process_first(local=False, desc="working folder"):
                if first:
                    stack.enter_context(self.held())
                checkpoint = self.open(first)
                if first:
                    self.discard_broken()
            yield checkpoint

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, or enter it again, and keep other trainings out of it for the length of the block.

        Raises:
            ArtefactError: There can be no folder.
            TrainingError: Another training is in it, or it is none of a training.
        """
        with writing(self.out):
            if self.folder.is_file() or (self.folder.is_dir() and self._is_foreign()):
                raise TrainingError(f"{self.folder} is in the way: checkpoints go there; move it")
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder) as free:
            if free is False:
                raise TrainingError(
                    f"{self.folder} is in use: another training for {self.out} is running; wait for its end, stop it, "
                    "or train into another folder"
                )
            yield

    def open(self, first: bool = True) -> Path | None:
        """The newest whole checkpoint, if there is one; without one the folder becomes that of this training.

        Args:
            first: Whether this is the first of the processes that train as one.

        Raises:
            ArtefactError: The folder cannot be written to.
            TrainingError: Its checkpoints are of another training.
        """
        path, newest = self.folder / RUN_NAME, newest_checkpoint(self.folder)
        if newest is not None or (path.is_file() and not first):
            self._compare(path)
        else:  # whatever failed here before left nothing to go on with
            with writing(self.out):
                self.folder.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps(self.identity, indent=2))
        return newest

    def complete(self, step: int) -> None:
        """The checkpoint of a step is whole: mark it, and remove the others."""
        newest = self.folder / f"checkpoint-{step}"
        (newest / MARK_NAME).touch()
        for folder in _checkpoints(self.folder):
            if folder != newest:
                shutil.rmtree(folder, ignore_errors=True)

    def discard_broken(self) -> None:
        """Remove checkpoints that a killed training left half-written."""
        for folder in _checkpoints(self.folder):
            if not (folder / MARK_NAME).is_file():
                shutil.rmtree(folder)

    def remove(self) -> None:
        """The training is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_foreign(self) -> bool:
        return not (self.folder / RUN_NAME).is_file() and any(self.folder.glob("[!.]*"))

    def _compare(self, path: Path) -> None:
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(there, dict)
        except (ValueError, AssertionError):
            raise TrainingError(f"{path} is damaged: remove {self.folder} to begin anew") from None
        for key in sorted(self.identity.keys() | there.keys()):
            if (old := there.get(key)) != (new := self.identity.get(key)):
                raise TrainingError(
                    f"{self.folder} holds a training that was interrupted, with {key} {old!r}, and this one has "
                    f"{new!r}: give the same settings to go on, or remove that folder to begin anew"
                )


def _checkpoints(folder: Path) -> list[Path]:
    """By step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
