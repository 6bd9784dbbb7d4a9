"""`gazepatch train`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gazepatch.cli.output import json_option, print_json, quiet
from gazepatch.cli.settings import config_from, options_of
from gazepatch.cli.usage import bad_usage
from gazepatch.config import GazeConfig
from gazepatch.training.settings import TrainConfig


@click.command("train", short_help="Train MODEL to read few regions of its images.")
@click.argument("model")
@click.argument("data")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder to write; new, or empty.")
@click.option("--force", is_flag=True, help="Replace DIR if it is an artefact already.")
@options_of(TrainConfig())
@options_of(GazeConfig.paper())
@click.option(
    "--trainer",
    "trainer",
    multiple=True,
    metavar="NAME=VALUE",
    help="Further argument of transformers' TrainingArguments, such as report_to=wandb or bf16=true. Repeatable.",
)
@json_option
def command(
    model: str, data: str, out: str, force: bool, trainer: tuple[str, ...], as_json: bool, **settings: Any
) -> None:
    """Train MODEL to read few regions of its images, on conversations in DATA.

    MODEL is a local folder or Hub id, DATA a file of JSON lines, {"messages": [...], "images": [...]} or LLaVA's form,
    a folder with one, or the name of a set of `datasets`. Interrupted, the same command goes on from the last
    checkpoint, kept in DIR.work. On several processes: torchrun --nproc-per-node N -m gazepatch.cli train ...
    """
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    training = config_from({name: settings.pop(name) for name in names}, TrainConfig())
    config = config_from(settings, GazeConfig.paper())
    arguments = dict(_argument(text) for text in trainer)

    import torch

    import gazepatch
    from gazepatch.artefact.manifest import read

    quiet()
    with bad_usage(), _going_on(out):
        folder = gazepatch.train(
            model, data, out, config=config, training=training, trainer_arguments=arguments, force=force
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # while all are there: who ends later would find the others gone
    if int(os.environ.get("RANK", 0)):
        return  # the first process speaks for all
    manifest = read(folder)
    provenance = dict(manifest.provenance or {})
    if as_json:
        print_json({"path": str(folder), "model": model, "gaze": manifest.gaze.to_dict(), "training": provenance})
    else:
        agreement = provenance["final_agreement_in_training"]  # None where there was nothing to compare with
        agrees = "" if agreement is None else f", agreement with dense {agreement:.1%}"
        click.echo(
            f"{folder}\nLast loss {provenance['final_loss']:.4g}{agrees}, on its own data. "
            f"Try: gazepatch ask {shlex.quote(out)} IMAGE PROMPT"
        )


@contextmanager
def _going_on(out: str) -> Iterator[None]:
    """Say how a training goes on that is interrupted from the keyboard."""
    try:
        yield
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)):
            raise  # the first process speaks for all
        from gazepatch.training.checkpoints import newest_checkpoint, working_folder

        work = working_folder(Path(out).absolute())
        if newest_checkpoint(work) is not None:
            then = f"the same command goes on from the last checkpoint in {work}"
        else:
            then = "there is no checkpoint yet (--save-every), so the same command begins anew"
        raise click.ClickException(f"interrupted: {then}") from None


def _argument(text: str) -> tuple[str, Any]:
    """`name=value`; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.UsageError(f"--trainer takes NAME=VALUE, got {text!r}", click.get_current_context())
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
