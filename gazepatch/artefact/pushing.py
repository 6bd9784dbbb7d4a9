"""Artefacts are pushed to the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gazepatch.artefact.contents import Contents, contents_of, may_be_replaced
from gazepatch.artefact.manifest import FILE_NAME
from gazepatch.errors import ArtefactError, ConfigError, HubError
from gazepatch.hub.failures import hub_failures
from gazepatch.hub.fetching import is_repo_id

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

MAIN = "main"

# The Hub applies the .gitignore of a repository to uploads, in silence, unless it is given another one.
_IGNORE_NOTHING = "# everything is sent\n"

_PUSH_AGAIN = "then push again: the artefact is there whole or not at all, and what has arrived is not sent twice"

_BRANCH = re.compile(r"(?!.*(\.\.|//|\.lock$|/$|\.$))[A-Za-z0-9_][A-Za-z0-9._/-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Push:
    """What `push` did, or would do.

    Attributes:
        repo: The repository.
        revision: The branch; with a pull request, the one it was opened against.
        url: Of the commit or the pull request; of the repository after a dry run.
        commit: The commit, or None after a dry run.
        changed: Whether there was anything to change: pushing the same folder again makes no commit. None after a dry
            run, which does not compare contents.
        files: The files that the repository then holds of this folder, and their sizes in bytes.
        removed: Files of the artefact that was there before, which this one does not have.
        left_out: What lies in the folder and was not sent, because it is not the artefact's.
    """

    repo: str
    revision: str
    url: str
    commit: str | None
    changed: bool | None
    files: Mapping[str, int]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Push:
    """Publish an artefact on the Hub, in one commit: all of it appears there, or nothing.

    Only the artefact's own files are sent. Called again after an interruption, it sends again only what had not
    arrived whole. Files that an older artefact in the repository had and this one has not are removed there.

    Args:
        folder: The artefact, an adapter or a full checkpoint. It is only read.
        repo_id: `owner/name`. The repository is made if there is none.
        private: Make it private. An existing public one is refused.
        revision: Branch, made from `main` if there is none; by default `main`.
        create_pr: Open a pull request against `main` of a repository that exists.
        token: Access token, by default the one of `hf auth login` or HF_TOKEN.
        dry_run: Only say what would be done: the Hub is asked, and nothing is written.

    Raises:
        ConfigError: `repo_id` or `revision` is malformed.
        ArtefactError: The folder is not a whole artefact, or names a base model that nobody else can load.
        HubError: The Hub cannot be reached or refuses; the message says what to do before pushing again.
    """
    from huggingface_hub import HfApi

    check_repo_id(repo_id)
    _check_branch(revision, create_pr)
    folder = Path(folder)
    contents = contents_of(folder)
    if not contents.manifest.full:
        again = f"gazepatch.save(gazepatch.load({str(folder)!r}, base=ID), out)"
        check_base(contents.manifest.base_model, f"write the same adapter for the model's Hub id, with {again}")

    api = HfApi(token=token, library_name="gazepatch")
    with hub_failures(f"pushing to {repo_id}", repo_id, _PUSH_AGAIN):
        there = _state_of(api, repo_id, revision)
        _check_target(there, repo_id, private, create_pr)
        url, removed = f"{api.endpoint}/{repo_id}", _outdated(there, contents)
        plan = Push(repo_id, revision or MAIN, url, None, None, contents.files, removed, contents.left_out)
        if dry_run:
            return plan
        if there is None:
            api.create_repo(repo_id, private=private or None)
        if plan.revision != MAIN and (there is None or not there.has_revision):
            api.create_branch(repo_id, branch=plan.revision)
        done = _commit(api, folder, plan, create_pr, there)
    changed = there is None or done.oid != there.commit
    return replace(plan, url=done.pr_url or done.commit_url, commit=done.oid, changed=changed)


def check_repo_id(repo_id: str) -> None:
    """Raise ConfigError unless this is the name of a repository that an artefact can be pushed to."""
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ConfigError(
            f"repo_id must be owner/name, of letters, digits, '-', '_' and '.' (no '--' or '..'), got {repo_id!r}"
        )


def check_base(base_model: str | None, advice: str) -> None:
    """Raise ArtefactError unless others can load the base model of an adapter too: it is of no use to them otherwise.

    Args:
        base_model: As in its manifest: a Hub id, or the absolute path of a folder.
        advice: How to come by an adapter with a Hub id.
    """
    if base_model is None or not is_repo_id(base_model):
        raise ArtefactError(
            f"an adapter with a folder of this machine as its base model, {base_model}, is not published, as nobody "
            f"else can load it: {advice}; or publish a full artefact, with the model's own files (full=True or --full)"
        )


@dataclass(frozen=True)
class _State:
    """What a repository holds at a revision, or on `main` where there is no such revision yet."""

    commit: str | None
    private: bool
    files: frozenset[str]
    has_revision: bool


def _state_of(api: HfApi, repo_id: str, revision: str | None) -> _State | None:
    """None where there is no such repository, or none that the token may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    has_revision = True
    try:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            if revision is None:
                raise
            info, has_revision = api.model_info(repo_id), False
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    files = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return _State(info.sha, bool(info.private), files, has_revision)


def _check_target(there: _State | None, repo_id: str, private: bool, create_pr: bool) -> None:
    """Refuse what would publish more than was meant, or write over somebody's model."""
    if there is None:
        if create_pr:
            raise HubError(
                f"{repo_id} does not exist, or the token in use may not see it: a pull request needs a repository; "
                "push without one (without create_pr or --create-pr) to make it"
            )
        return
    if private and not there.private:
        raise HubError(
            f"{repo_id} is public already, and private was asked for: make it private in its settings first, "
            "or push without private (--private)"
        )
    if "config.json" in there.files and FILE_NAME not in there.files and not create_pr:
        raise HubError(
            f"{repo_id} holds a model and no gaze artefact, so nothing is written over it: choose another repository, "
            "or propose it there with a pull request (create_pr or --create-pr)"
        )


def _outdated(there: _State | None, contents: Contents) -> tuple[str, ...]:
    """Files of the artefact in the repository that would mislead whoever loads the new one."""
    if there is None or FILE_NAME not in there.files:
        return ()
    return tuple(sorted(name for name in there.files - contents.files.keys() if may_be_replaced(name)))


def _commit(api: HfApi, folder: Path, plan: Push, create_pr: bool, there: _State | None) -> CommitInfo:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(name, folder / name) for name in plan.files]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in plan.removed]
    if there is not None and ".gitignore" in there.files:
        api.preupload_lfs_files(
            plan.repo,
            additions,
            revision=plan.revision,
            create_pr=create_pr,
            free_memory=False,
            gitignore_content=_IGNORE_NOTHING,
        )
    return api.create_commit(
        plan.repo,
        [*additions, *deletions],
        commit_message="Publish a gaze artefact",
        revision=plan.revision,
        create_pr=create_pr,
        parent_commit=there.commit if there is not None else None,  # refused if somebody else was faster
    )


def _check_branch(revision: str | None, create_pr: bool) -> None:
    if revision is None:
        return
    if create_pr:
        raise ConfigError(f"a pull request is opened against {MAIN}: leave out the revision {revision!r}, or create_pr")
    if not _BRANCH.fullmatch(revision) or _COMMIT.fullmatch(revision):
        raise ConfigError(f"revision must be the name of a branch, such as {MAIN} or v1, got {revision!r}")
