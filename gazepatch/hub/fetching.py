"""Models and artefacts are fetched from the Hub, or taken from where they are on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from gazepatch.errors import ArtefactError, ConfigError, HubError
from gazepatch.hub.failures import hub_failures


class Fetched(NamedTuple):
    """A folder or file on this machine, and the commit it comes from, None for what was here already."""

    path: Path
    commit: str | None


def fetch(
    source: str | Path,
    *,
    file: str | None = None,
    only: list[str] | None = None,
    revision: str | None = None,
    **hub: Any,
) -> Fetched:
    """A model or artefact as a local folder, or one file of it, downloading what is not in the cache.

    Without a connection, or with HF_HUB_OFFLINE, what the cache holds is taken.

    Args:
        source: Local folder, or Hub id.
        file: The path of one file in it: nothing else is downloaded, and its own path is returned.
        only: Patterns of the files to download, by default all; a local folder is taken as it is.
        revision: Branch, tag or commit on the Hub.
        **hub: For `huggingface_hub`: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Raises:
        ConfigError: A revision was given for a local folder.
        ArtefactError: `source` is a file, or a folder without `file`.
        HubError: There is no such folder, or the Hub does not give it.
    """
    if os.path.exists(source):
        return Fetched(_local(Path(source), file, revision), None)
    from huggingface_hub import hf_hub_download, snapshot_download

    repo = str(source)
    if not is_repo_id(repo):
        raise HubError(f"expected a folder or a Hub id, owner/name, got {repo!r}, which is neither")
    what = f"{file} of {repo}" if file else repo
    with hub_failures(f"fetching {what}{f' at {revision}' if revision else ''}", repo, try_again(repo)):
        if file is None:
            root = Path(snapshot_download(repo, revision=revision, allow_patterns=only, **hub))
            return Fetched(root, root.name)
        path = Path(hf_hub_download(repo, file, revision=revision, **hub))
        return Fetched(path, path.parents[file.count("/")].name)


def try_again(repo: str) -> str:
    """What to do once the Hub gives a model or an artefact; a mistyped folder is taken for one of its ids."""
    return f"then try again. There is no folder {repo} here either: if one was meant, check the path"


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub can have this id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _local(source: Path, file: str | None, revision: str | None) -> Path:
    if revision is not None:
        raise ConfigError(f"a revision goes with a Hub id, got {revision!r} with the local folder {source}")
    if not source.is_dir():
        raise ArtefactError(f"expected a folder or a Hub id, got a file: {source}")
    if file is None:
        return source
    if not (source / file).is_file():
        raise ArtefactError(f"expected a folder with {file}, got {source} without it")
    return source / file
