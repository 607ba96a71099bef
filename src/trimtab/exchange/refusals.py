"""What the hub's client raises, in our words: what is wrong, and what would work."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from trimtab.errors import HubError, TrimtabError, printable


def endpoint() -> str:
    """Return the hub's address, without a password that may stand in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextmanager
def asking(repo: str, revision: str | None) -> Generator[None]:
    """Turn whatever the hub's client raises into a `HubError`; nothing but calls of the client belongs into it."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:  # noqa: BLE001 # what it raises shares no other base
        raise HubError(_explained(error, repo, revision)) from None


def _explained(error: BaseException, repo: str, revision: str | None) -> str:
    """Say what went wrong on the hub, and what would work."""
    from huggingface_hub import errors

    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # an upload in a thread wraps its error
        error = error.__cause__
    login = "`hf auth login`, or set HF_TOKEN"
    chain: Sequence[tuple[Any, str]] = (
        (errors.OfflineModeIsEnabled, "The hub's client is offline, by HF_HUB_OFFLINE. Unset it to go online."),
        (
            errors.GatedRepoError,
            f"{repo} is gated. Ask for access at {endpoint()}/{repo}, and log in by {login}.",
        ),
        (
            errors.RevisionNotFoundError,
            f"{repo} has no revision {revision or 'main'!r}. Pass a branch, a tag or a commit that it has.",
        ),
        (
            errors.RepositoryNotFoundError,
            f"There is no model repository {repo} that you may see. "
            f"Check the name; if it is private, log in by {login}.",
        ),
        (errors.EntryNotFoundError, f"{repo} does not have the file any more, or it cannot be reached. Try again."),
    )
    for kind, text in chain:
        if isinstance(error, kind):
            return text
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, repo, login)
    if isinstance(error, errors.HTTPError):  # pyright: ignore[reportPrivateImportUsage]
        return f"{endpoint()} cannot be reached: {_said(error)}. Check the network, and HF_ENDPOINT if you set it."
    if isinstance(error, OSError):
        return f"The file could not be sent or fetched: {_said(error)}."
    return f"{endpoint()} does not answer as the hub does: {_said(error)}. Check HF_ENDPOINT if you set it."


def _refused(error: Any, repo: str, login: str) -> str:
    status = error.response.status_code
    said = f" It says: {_said(error.server_message)}." if error.server_message else ""
    if status == 401:
        return f"The hub does not accept the token ({status}).{said} Log in anew by {login}."
    if status == 403:
        return f"You may not do that to {repo} ({status}).{said} Use a token that may write there, by {login}."
    if status in (409, 412):
        return f"{repo} was changed meanwhile ({status}).{said} Look at it, and push again."
    return f"The hub refused ({status}).{said} Try again later; if it goes on, look at {endpoint()}/{repo}."


def _said(error: object) -> str:
    """Write the words of others on one line, without the token and the password, whoever put them there."""
    from huggingface_hub import constants, get_token

    text, token = (str(error) or type(error).__name__).replace(constants.ENDPOINT, endpoint()), None
    with suppress(Exception):  # to look for it may be what has failed
        token = get_token()
    text = text.replace(token, "***") if token else text
    return printable(" ".join(text.split()))[:300].rstrip(".")
