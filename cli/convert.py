"""`gazepatch convert`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from gazepatch.cli.output import bar_of, json_option, print_json, quiet
from gazepatch.cli.settings import config_from, options_of
from gazepatch.cli.usage import bad_usage
from gazepatch.config import GazeConfig
from gazepatch.errors import ConfigError


@click.command("convert")
@click.argument("model")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder to write; new, or empty.")
@click.option("--revision", metavar="NAME", help="Commit, branch or tag of MODEL on the Hub.")
@click.option("--full", is_flag=True, help="Take the model's own files along: a checkpoint for plain transformers too.")
@click.option("--link", is_flag=True, help="With --full: hard links of the weights instead of copies, where possible.")
@click.option("--context-tokens", metavar="FILE", type=click.Path(exists=True), help="Trained context tokens.")
@click.option("--verify", is_flag=True, help="Load it, check it as `gazepatch verify` does, and put that on the card.")
@click.option("--push", "repo", metavar="REPO", help="Then publish it as `gazepatch push DIR REPO` does.")
@click.option("--force", is_flag=True, help="Replace DIR if it is an artefact already.")
@options_of(GazeConfig(), without=("context_tokens",))
@json_option
def command(
    model: str,
    out: str,
    revision: str | None,
    full: bool,
    link: bool,
    context_tokens: str | None,
    verify: bool,
    repo: str | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make a gaze artefact for MODEL, a local folder or Hub id.

    Reads the model's small files alone, never its weights, and writes a folder of a few kilobytes that
    gazepatch.load and `gazepatch ask` take in place of the model.
    """
    config = config_from(settings, GazeConfig())
    if link and not full:
        raise click.UsageError("--link goes with --full", click.get_current_context())

    if repo is not None:
        _check_push(repo, model, full)
    if verify:
        _check_verify(model, revision, config)

    import gazepatch
    from gazepatch.artefact.manifest import read

    quiet()
    with bar_of("copy", "B") as progress, bad_usage():
        folder = gazepatch.convert(
            model,
            out,
            config=config,
            context_tokens=context_tokens,
            full=full,
            link=link,
            revision=revision,
            force=force,
            progress=progress,
        )
    fidelity = _measured(folder) if verify else None
    url = gazepatch.push(folder, repo).url if repo is not None else None
    if as_json:
        written = read(folder).gaze.to_dict()  # the number of context tokens is that of the file
        print_json({"path": str(folder), "model": model, "gaze": written, "fidelity": fidelity, "url": url})
    else:
        ask = f"gazepatch ask {shlex.quote(out)} IMAGE PROMPT"
        click.echo(f"{folder}\nLoad it with gazepatch.load({out!r}), or try: {ask}")
        if fidelity is not None:
            click.echo(
                f"Checked on one image: agrees with dense on {fidelity['agreement']:.1%} of {fidelity['steps']} tokens "
                f"while reading {fidelity['read_share']:.1%} of the visual entries."
            )
        if url is not None:
            click.echo(url)


def _check_push(repo: str, model: str, full: bool) -> None:
    """Refuse what could not be pushed, before anything is written."""
    from gazepatch.artefact.pushing import check_base, check_repo_id

    with bad_usage():
        check_repo_id(repo)
    if not full:
        check_base(os.path.abspath(model) if os.path.isdir(model) else model, "convert the model by its Hub id")


def _check_verify(model: str, revision: str | None, config: GazeConfig) -> None:
    """Refuse what could not be verified, before anything is written."""
    import torch

    from gazepatch.backend import choose
    from gazepatch.cli.opening import device
    from gazepatch.processors import open_processor

    quiet()
    with bad_usage():
        choose(config.backend, torch.device(device()))
    open_processor(model, revision)


def _measured(folder: Path) -> dict[str, Any]:
    """What was measured on the test image, also written into the artefact. A promise that is not kept is an error."""
    import gazepatch
    from gazepatch.artefact.fidelity import checks_of, measure_fidelity
    from gazepatch.artefact.making import record_fidelity
    from gazepatch.cli.opening import open_model, prompt_inputs
    from gazepatch.cli.sample import PROMPT, SIDE_PX, sample_image

    patched, processor = open_model(str(folder))
    inputs = prompt_inputs(patched, processor, [sample_image()], PROMPT)
    on = f"one made-up image of {SIDE_PX} x {SIDE_PX} pixels, {PROMPT!r}"
    try:
        report = gazepatch.verify(patched, inputs)
        fidelity = {"input": on, **measure_fidelity(patched, inputs), "checks": checks_of(report)}
    except ConfigError as error:
        raise click.ClickException(f"{folder} is written, but cannot be checked: {error}") from error
    record_fidelity(folder, fidelity)
    if not report.passed:
        broken = ", ".join(check.name for check in report.checks if not check.passed)
        raise click.ClickException(
            f"{folder} is written, but does not keep its promises on this machine: {broken}; see gazepatch verify"
        )
    return fidelity
