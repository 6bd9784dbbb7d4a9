"""What the Hub's client raises, said in our words: what failed, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gazepatch.errors import GazeError, HubError

#: The HTTP clients of huggingface_hub 1 and 2.
_CLIENTS = ("httpx", "httpcore", "httpx2", "httpcore2")

# The Hub has several statuses for it, 403 among them, and says in words what is full.
_QUOTA_STATUSES = (402, 413, 507)
_QUOTA_WORDS = ("quota", "storage", "payment", "too large", "billing")


@contextmanager
def hub_failures(doing: str, repo: str, again: str) -> Iterator[None]:
    """Whatever the client raises inside becomes a HubError.

    Args:
        doing: What is being done, such as `pushing to owner/name`.
        repo: The repository's name.
        again: What to do once the cause is gone.
    """
    try:
        yield
    except GazeError:
        raise
    except Exception as error:  # the client raises errors of its own, of httpx, of hf_xet, ValueError and RuntimeError
        chain = list(_chain(error))
        known = (_explained(link, repo, _text(chain)) for link in chain)
        cause = next(filter(None, known), f"{type(error).__name__}: {_text(chain[:1])}")
        raise HubError(f"{doing} failed: {cause}; {again}") from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it: the client wraps what it met in errors of its own."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _explained(error: BaseException, repo: str, said: str) -> str | None:
    from huggingface_hub import errors

    why = error.__cause__ or error.__context__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(why, (errors.OfflineModeIsEnabled, type(None))):
        return (
            "the Hub may not be asked (HF_HUB_OFFLINE or local_files_only), and the cache does not hold it: go "
            "online once"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub may not be asked, as HF_HUB_OFFLINE is set: unset it"
    if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
        return f"{_refused(error, status, repo, said)} (status {status})"
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.partition(".")[0] in _CLIENTS:
        return f"the connection to the Hub failed or broke off ({type(error).__name__}: {_text([error])}): check it"
    if isinstance(error, ValueError) and any(word in said.lower() for word in _QUOTA_WORDS):
        return f"the Hub has no room for it: {said}"
    return None


def _refused(error: Any, status: int, repo: str, said: str) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask its owner for access on its page, and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision: look up its branches, tags and commits"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{repo} has no such file: {said}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"{repo} does not exist, or the token in use may not see it: check the name, and `hf auth whoami`"
    if status == 401:
        return "the Hub knows no valid token: log in with `hf auth login`, or set HF_TOKEN"
    if status in _QUOTA_STATUSES or (status == 403 and any(word in said.lower() for word in _QUOTA_WORDS)):
        return f"the Hub has no room for it: {said}: remove what is not needed there, or ask for more"
    if status == 403:
        return f"the token in use may not do that with {repo}: take one with the rights for it"
    if status in (409, 412):
        return f"{repo} was changed by somebody else meanwhile, or is in use: {said}"
    if status == 429:
        return "the Hub takes no more requests for now: wait a few minutes"
    if status >= 500:
        return "the Hub has trouble itself: see https://status.huggingface.co"
    return f"the Hub refuses: {said}"


def _text(chain: list[BaseException]) -> str:
    """The Hub's own words if there are any, or those of the first error, in one line."""
    words = next((text for link in chain if (text := getattr(link, "server_message", None))), None) or str(chain[0])
    return " ".join(words.split()) or type(chain[0]).__name__
