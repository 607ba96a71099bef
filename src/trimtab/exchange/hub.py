"""Push a knob to a model repository on the Hugging Face hub, with its card, and pull one from there.

Everything that a repository holds is a stranger's: names of files are checked before they become names here, nothing
but one knob file is taken, and that one is read, checksum and all, before it is put anywhere.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from trimtab.artifact import AnyKnob, load_knob
from trimtab.artifact.file import refuse_to_replace, save_bytes
from trimtab.errors import HubError, KnobError, OptionError, brief
from trimtab.exchange.constant import new_folder
from trimtab.exchange.model_card import CARD, PLOT, dose_plot, is_generated, is_repository, licence_of, model_card
from trimtab.exchange.refusals import asking, endpoint
from trimtab.files import is_knob_file, open_regular, reason, replacing

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

SUFFIX = ".safetensors"
CARD_LIMIT = 2**20
"""Longest card that is compared with ours, in bytes; ours are far shorter."""
SHOWN = 20
"""Files that a message names at most."""


class Pushed(NamedTuple):
    """Where the knob is now; after a dry run `commit` is None, and `url` where it would be."""

    url: str
    commit: str | None
    files: tuple[str, ...]


class Pulled(NamedTuple):
    """A knob with the commit it came from, its name there, and the file here."""

    knob: AnyKnob
    path: Path
    file: str
    commit: str


def push(
    path: str | Path,
    repo: str,
    *,
    licence: str | None = None,
    private: bool = False,
    message: str | None = None,
    revision: str | None = None,
    replace_card: bool = False,
    dry_run: str | Path | None = None,
) -> Pushed:
    """Push a knob file as it is, with a model card and the plot of its dose-response, in one commit.

    A repository `OWNER/NAME` that does not exist is made, and so is the branch `revision`. `licence` is needed where
    the knob states none. With `dry_run`, a folder that is new or empty, the files are written there and nothing is
    sent. Raises `KnobError` for a file that is no knob, `OptionError` for what cannot be asked for, and `HubError` for
    what the hub refuses, for a repository that is public where `private` was asked for, and for a card there that
    somebody wrote or edited, unless `replace_card` is set.
    """
    if not isinstance(path, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"The path of a knob file is pushed; got {brief(path)}. Save the knob first.")
    path = Path(path)
    _check_names(repo, revision)
    if path.suffix == ".json":
        raise OptionError(f"{brief(str(path), 240)} is named as panels are. Push the knobs that it names, one by one.")
    knob = load_knob(path)
    if not _is_plain(path.name) or "/" in path.name:
        raise OptionError(
            f"A knob is pushed under its file's name, which ends in {SUFFIX} and looks like no path or option; "
            f"got {brief(path.name, 240)}. Rename the file."
        )
    allowed = licence_of(knob, licence)
    if message is not None and not message.strip():
        raise OptionError("The message of the commit is empty. Leave it out for one that names the knob.")
    if dry_run is not None:
        files = _files(knob, path, model_card(knob, repo, path.name, licence=allowed))
        _write_all(Path(dry_run), files)
        return Pushed(_url(repo, revision), None, tuple(files))
    with asking(repo, revision):
        api = _api(write=True)
        found = _find(api, repo, revision)
        if found.info is not None:
            _check_found(api, repo, found.info, private=private, replace_card=replace_card)
        several = found.info is not None and any(name != path.name for name in _knobs_in(found.info))
    files = _files(knob, path, model_card(knob, repo, path.name, licence=allowed, several=several))
    with asking(repo, revision):
        return _commit(api, repo, files, found, revision, private, message or f"Push the knob {knob.name}")


def pull(repo: str, *, file: str | None = None, revision: str | None = None, out: str | Path | None = None) -> Pulled:
    """Download one knob file of a repository, read it, and only then put it to `out`.

    `file` is needed where the repository holds several. Without `out` the knob stays in the hub's cache; a folder takes
    it under its own name, unless another knob has that there. A file that is no knob is not replaced. Raises `HubError`
    for what the hub refuses or does not have, `KnobError` for a file that is no knob, `OptionError` for names that
    cannot be asked for.
    """
    _check_names(repo, revision)
    if file is not None and not _is_plain(file):
        raise OptionError(f"No knob is pulled from a file of that name; got {brief(file, 240)}.")
    with asking(repo, revision):
        api = _api()
        info = api.model_info(repo, revision=revision)
        commit = _commit_of(info)
        if commit is None:
            raise HubError(f"{repo} has no commit yet, and so no knob. Pass a repository that somebody has pushed to.")
        name = _choose(repo, info, file)
    target = None if out is None else Path(out) / Path(name).name if Path(out).is_dir() else Path(out)
    if target is not None:
        refuse_to_replace(target, "knob", is_knob_file)
    with asking(repo, revision):
        _check_start(api, repo, name, commit)
        cached = Path(api.hf_hub_download(repo, name, revision=commit))
    try:
        knob = load_knob(cached)
    except KnobError as error:
        said = str(error).partition(": ")[2] or str(error)
        raise KnobError(f"{name} of {repo} at commit {commit[:12]} is no knob that can be used: {said}") from None
    if target is not None:
        if out is not None and Path(out).is_dir() and target.exists() and target.read_bytes() != cached.read_bytes():
            raise KnobError(f"{str(target)!r} is another knob, and its name is {repo}'s choice. Pass out, with a name.")
        _copy(cached, target)
    return Pulled(knob, target or cached, name, commit)


# What is pushed


def _files(knob: AnyKnob, path: Path, card: str) -> dict[str, Path | bytes]:
    plot = dose_plot(knob)
    return {path.name: path, CARD: card.encode(), **({} if plot is None else {PLOT: plot})}


def _write_all(folder: Path, files: dict[str, Path | bytes]) -> None:
    with new_folder(folder) as made:
        for name, content in files.items():
            if isinstance(content, Path):
                _copy(content, made / name)
            else:
                save_bytes(made / name, content)


def _copy(source: Path, target: Path) -> None:
    try:
        with open_regular(source) as (file, _), replacing(target) as new:
            shutil.copyfileobj(file, new)
    except OSError as error:
        raise KnobError(
            f"Cannot write {brief(str(target), 240)}: {reason(error)}. Nothing there was changed."
        ) from None


class _Found(NamedTuple):
    """The repository as it is, None before it is made; whether the branch is there."""

    info: ModelInfo | None
    branch: bool


def _find(api: HfApi, repo: str, revision: str | None) -> _Found:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return _Found(api.model_info(repo, revision=revision), True)
    except GatedRepoError:
        raise
    except RevisionNotFoundError:
        if revision is None:
            raise
        return _Found(api.model_info(repo), False)  # the branch begins with what is there
    except RepositoryNotFoundError:
        return _Found(None, revision in (None, "main"))


def _check_found(api: HfApi, repo: str, info: ModelInfo, *, private: bool, replace_card: bool) -> None:
    """Raise `HubError` for a repository that everybody sees where that was not asked for, or whose card is not ours."""
    if private and not info.private:
        raise HubError(
            f"{repo} exists and is public, and pushing does not hide it. Make it private in its settings, push "
            "to another repository, or do not ask for a private one."
        )
    if replace_card or CARD not in _names_in(info):
        return
    with Path(api.hf_hub_download(repo, CARD, revision=_commit_of(info))).open("rb") as file:
        text = file.read(CARD_LIMIT).decode(errors="replace")
    if not is_generated(text):
        raise HubError(
            f"{repo} has a {CARD} that Trimtab did not write, or that was edited since, and it is not replaced "
            "unasked. Pass replace_card=True to replace it, or push to another repository."
        )


def _commit(
    api: HfApi,
    repo: str,
    files: dict[str, Path | bytes],
    found: _Found,
    revision: str | None,
    private: bool,
    message: str,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd

    if found.info is None:
        api.create_repo(repo, private=True if private else None, exist_ok=True)
    if not found.branch and revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    done = api.create_commit(
        repo,
        [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in files.items()
        ],
        commit_message=message,
        revision=revision,
        # What was looked at is what is built on: a card that somebody writes meanwhile is not lost.
        parent_commit=None if found.info is None else _commit_of(found.info),
    )
    return Pushed(_url(repo, revision), str(done.oid), tuple(files))


# What is pulled


def _check_start(api: HfApi, repo: str, name: str, commit: str) -> None:
    """Raise `KnobError` for a file whose start is no knob's, before the gigabytes of a model are fetched."""
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        held = api.parse_safetensors_file_metadata(repo, name, revision=commit).metadata
    except SafetensorsParsingError:
        held = {}
    if "trimtab" not in (held or {}):
        raise KnobError(f"{name} of {repo} at commit {commit[:12]} is no knob: it does not begin as one does.")


def _choose(repo: str, info: ModelInfo, file: str | None) -> str:
    """Return the name of the one knob file, which may be a stranger's, but is a plain name."""
    names = _knobs_in(info)
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    if file is not None:
        if file not in names:
            raise HubError(f"{repo} has no knob file {file!r}. It has {listed or 'none'}.")
        return file
    if not names:
        odd = sum(name.endswith(SUFFIX) for name in _names_in(info))
        more = f" {odd} of its files end so, but their names are not taken from strangers." if odd else ""
        raise HubError(f"{repo} has no knob: none of its files is a {SUFFIX} file that can be pulled.{more}")
    if len(names) > 1:
        raise HubError(f"{repo} has several files that may be knobs: {listed}. Name one, as in file={names[0]!r}.")
    return names[0]


def _names_in(info: ModelInfo) -> list[str]:
    return [str(entry.rfilename) for entry in info.siblings or []]


def _knobs_in(info: ModelInfo) -> list[str]:
    return sorted({name for name in _names_in(info) if _is_plain(name)})


def _is_plain(name: str) -> bool:
    """Tell whether a file's name may become one here: no way out of a folder, no option, no command to a terminal.

    >>> [_is_plain(name) for name in ("a.safetensors", "of/a.safetensors", "../a.safetensors", "-a.safetensors")]
    [True, True, False, False]
    """
    return (
        name.endswith(SUFFIX)
        and name.isprintable()
        and not re.search(r"[\\:'\"`<>|*?$&;]", name)
        and all(part and part[0] not in ".-~ " and len(part.encode()) <= 200 for part in name.split("/"))
    )


# The hub


def _check_names(repo: str, revision: str | None) -> None:
    if not isinstance(repo, str) or not is_repository(repo):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(
            f"A repository is named OWNER/NAME, by letters, digits, '-', '_' and '.'; got {brief(repo, 120)}."
        )
    if revision is not None and not (revision.strip() and revision.isprintable()):
        raise OptionError(f"A revision is the name of a branch or a tag, or a commit; got {brief(revision)}.")


def _api(*, write: bool = False) -> HfApi:
    """Return the hub's client; raises `HubError` where writing needs a login and there is none."""
    from huggingface_hub import HfApi, get_token

    if write and not get_token():
        raise HubError("There is no token for the hub. Run `hf auth login`, or set HF_TOKEN to one that may write.")
    return HfApi(library_name="trimtab")


def _commit_of(info: ModelInfo) -> str | None:
    sha: object = info.sha
    return sha if isinstance(sha, str) and re.fullmatch(r"[0-9a-f]{40}", sha) else None


def _url(repo: str, revision: str | None) -> str:
    return f"{endpoint()}/{repo}" + ("" if revision is None else f"/tree/{quote(revision, safe='')}")
