"""`gazepatch push`."""

from __future__ import annotations

import sys
from logging import ERROR

import click

from gazepatch.cli.output import json_option, print_json, print_table
from gazepatch.cli.usage import bad_usage

UNCHANGED = "Nothing to do: the repository holds just that."


@click.command("push", short_help="Publish the artefact in DIR on the Hub as REPO.")
@click.argument("folder", metavar="DIR")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private; an existing public one is refused.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to, made if there is none.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request against a repository that exists.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and write nothing.")
@json_option
def command(
    folder: str, repo: str, private: bool, revision: str | None, create_pr: bool, dry_run: bool, as_json: bool
) -> None:
    """Publish the artefact in DIR on the Hub as REPO (owner/name), in one commit.

    Nothing but the artefact's own files is sent. The token is that of `hf auth login` or HF_TOKEN. After an
    interruption the same command goes on: files that had arrived are not sent again.
    """
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    import gazepatch

    if not sys.stderr.isatty():  # bars and notices of retries are for people
        disable_progress_bars()
        logging.set_verbosity(ERROR)
    with bad_usage():
        done = gazepatch.push(folder, repo, private=private, revision=revision, create_pr=create_pr, dry_run=dry_run)
    if as_json:
        print_json(done)
        return
    if dry_run:
        click.echo(f"A dry run: nothing was sent. A push to branch {done.revision} of {done.url} would send")
        print_table(("bytes", "file"), [(size, name) for name, size in done.files.items()])
    else:
        click.echo(done.url)
        size = sum(done.files.values())
        click.echo(f"Published {len(done.files)} files, {size} bytes." if done.changed else UNCHANGED)
    removed, stays = ("It would remove there", "It would not send") if dry_run else ("Removed there", "Not sent")
    for label, names in ((removed, done.removed), (f"{stays}, as not the artefact's", done.left_out)):
        if names:
            click.echo(f"{label}: {', '.join(names)}")
