"""Finished steps of a long job, kept in a folder: a job that was stopped or killed goes on where it was.

The folder holds `job.json`, which says what the results depend on, and one file per finished step: safetensors for
tensors, JSON for plain values, which come back as they were, bit for bit. Each is written atomically and carries a
checksum, so a step is there whole or not at all. What Trimtab did not write is never changed or deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, LookaheadKnob
from trimtab.artifact.identity import IDENTITY, model_identity
from trimtab.errors import OptionError, TrimtabWarning, brief
from trimtab.files import parse_json, write_atomically
from trimtab.pairs import MOST_HASHES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trimtab.pairs import Pairs

T = TypeVar("T")

JOB = "job.json"
MOST_DIFFERENCES = 6
"""Points of difference that a message names."""
SAMPLE = 2**16
"""Values of a tensor that a digest looks at: all of a small tensor, and this many, evenly spaced, of a large one."""

_STEP = r"step-[\w.-]+-[0-9a-f]{12}\.(?:json|safetensors)"
_PART = r"\.(?:job\.json|step-[\w.-]+)\.[0-9a-f]{8}\.part"  # of a writer that was killed; long names are cut there
_OURS = re.compile(rf"job\.json|{_STEP}|{_PART}")


class Checkpoint:
    """A folder that keeps the finished steps of one job; None keeps nothing, and every step is computed.

    `job` returns everything, as JSON, that a step's value depends on; it is called only where there is a folder. The
    folder is made if it is missing. Raises `OptionError` where it holds another job (the message names what differs),
    where it holds files of somebody else, and where it cannot be written.
    """

    def __init__(self, folder: str | Path | None, job: Callable[[], Mapping[str, Any]]) -> None:
        if folder == "":
            raise OptionError("The name of the checkpoint's folder is empty.")
        if not isinstance(folder, str | Path | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"A checkpoint is the path of a folder, or None; got {brief(folder)}.")
        self._folder = None if folder is None else Path(folder)
        self._job = "" if self._folder is None else _open(self._folder, json.loads(json.dumps(job())))

    def step(self, key: str, compute: Callable[[], T]) -> T:
        """Return the plain JSON value that is kept under `key`, or compute it and keep it.

        A file that is damaged is computed again, with a `TrimtabWarning`. Raises `OptionError` when the disk is full.
        """

        def read(path: Path) -> T:
            record = json.loads(path.read_bytes())  # what we wrote ourselves may hold NaN: not the strict reader
            if record["sha256"] != _sha256(self._job, key, json.dumps(record["value"])):
                raise ValueError("the checksum differs")
            return record["value"]

        def write(path: Path, value: T) -> None:
            digest = _sha256(self._job, key, json.dumps(value))
            write_atomically(path, json.dumps({"step": key, "sha256": digest, "value": value}).encode())

        return self._take(f"{_name(key)}.json", compute, read, write)

    def tensors(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors that are kept under `key`, or compute and keep them; as for `step`."""

        def read(path: Path) -> dict[str, Tensor]:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get("sha256")
                value = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            if said != _sha256(self._job, key, to_bytes(value)):
                raise ValueError("the checksum differs")
            return value

        def write(path: Path, value: dict[str, Tensor]) -> None:
            digest = _sha256(self._job, key, to_bytes(value))
            write_atomically(path, to_bytes(value, {"step": key, "sha256": digest}))

        return self._take(f"{_name(key)}.safetensors", compute, read, write)

    def _take(
        self, name: str, compute: Callable[[], T], read: Callable[[Path], T], write: Callable[[Path, T], None]
    ) -> T:
        if self._folder is None:
            return compute()
        path = self._folder / name
        if path.exists():
            try:
                return read(path)
            except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                warnings.warn(
                    f"{str(path)!r} is damaged ({str(error).rstrip('.')}); this step is computed again.",
                    TrimtabWarning,
                    stacklevel=4,
                )
        value = compute()
        try:
            write(path, value)
        except OSError as error:
            _unwritable(self._folder, error)
        return value


NO_CHECKPOINT = Checkpoint(None, dict)
"""Keeps nothing."""


def remove(folder: str | Path) -> None:
    """Delete what `Checkpoint` wrote there, and the folder if nothing else is in it.

    A folder without a checkpoint's `job.json` is left as it is.
    """
    if _stored_job(Path(folder)) is None:
        return
    for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == JOB):  # job.json last: whole until then
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # something else is in it
        Path(folder).rmdir()


# What a job depends on


def describe_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what tells this model, this tokenizer and the way they compute from others, for the `job` of a checkpoint.

    The weights are known by `digest` of all parameters and buffers; those that are off-loaded, by name and shape.
    """
    adapter = Adapter(model)
    return {
        **{IDENTITY[key]: value for key, value in model_identity(model, tokenizer).items()},
        "weights": digest(chain(model.named_parameters(), model.named_buffers())),
        "adapters": fingerprint(_adapters(model)),
        "dtype": str(adapter.dtype),
        "device": adapter.device(0).type,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        **{f"version of {name}": number for name, number in versions().items()},
    }


def knob_content(knob: AnyKnob) -> dict[str, Any]:
    """Return what tells what this knob does from what others do, its dose apart, for the `job` of a checkpoint."""
    if isinstance(knob, DeltaKnob):
        return {"operation": knob.operation, "knob's weights": knob.digest}
    content: dict[str, Any] = {
        "operation": knob.operation,
        "knob's norms": {str(layer): norm for layer, norm in knob.norms.items()},
    }
    if isinstance(knob, LookaheadKnob):
        content["knob's gradient"] = knob.digest
        content["knob's scales"] = {str(layer): scale for layer, scale in knob.scales.items()}
        content["knob's way"] = [knob.backend, knob.step, knob.per_token]
        return content
    content["knob's vectors"] = digest((str(site), vector) for site, vector in knob.vectors.items())
    if knob.also:
        content["knob's further sites"] = list(map(str, knob.also))
    if knob.kernel is not None:
        content["knob's kernel"] = knob.kernel.header()
        content["knob's examples"] = digest(knob.kernel.tensors().items())
    return content


def _adapters(model: PreTrainedModel) -> list[object]:
    """List what the layers of PEFT adapters do with their weights: which are active, how much they count."""
    states = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = (module for module in model.modules() if hasattr(module, "active_adapters"))
    return [[getattr(layer, state, None) for state in states] for layer in layers]


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a sha256 of names, dtypes, shapes and `SAMPLE` values of each tensor."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):  # quantised: the values lie in tensors within
            inner = cast(Any, tensor).__tensor_flatten__()[0]
            state.update(digest((f"{name}.{part}", getattr(tensor, part)) for part in inner).encode())
            continue
        state.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if not tensor.is_meta:
            # An odd stride meets every column of a matrix, whose width is mostly a power of two.
            flat = tensor.detach().reshape(-1)
            some = flat[:: -(-len(flat) // SAMPLE) | 1].cpu().contiguous()
            state.update(some.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def fingerprint(value: object) -> str:
    """Return the sha256 of plain values, as their `repr` shows them: texts, numbers, and collections of these."""
    return _sha256(repr(value))


def versions() -> dict[str, str]:
    """Return the versions of Trimtab and of the packages that compute."""
    return {name: _version(name) for name in ("trimtab", "torch", "transformers")}


def learned_from(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    paper: str,
    options: Mapping[str, Any],
    licence: str | None,
) -> dict[str, Any]:
    """Return what a knob remembers of how it was learned: model, pairs, every option, and the tool."""
    return {
        "paper": paper or None,
        **model_identity(model, tokenizer),
        "pairs_hash": pairs.hash(),
        "pairs_count": len(pairs),
        "prompt_hashes": pairs.prompt_hashes()[:MOST_HASHES],
        "options": dict(options),
        "tool": f"trimtab {versions()['trimtab']}",
        "licence": licence,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


# The folder


def _open(folder: Path, job: dict[str, Any]) -> str:
    """Make the folder this job's, or check that it is; return the hash of the job, which every step carries."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
        stored = _stored_job(folder)
        if stored is None and (folder / JOB).exists():
            raise OptionError(f"{str(folder / JOB)!r} is damaged, or not of a checkpoint. {_WAY_OUT}")
        if stored is None and strangers:
            raise OptionError(
                f"Checkpoint {str(folder)!r} is a folder with other files, {strangers[0]!r} for one. Pass a new folder."
            )
        if stored is None:
            write_atomically(folder / JOB, json.dumps({"trimtab": "checkpoint", "job": job}, indent=1).encode())
        elif stored != job:
            raise OptionError(f"Checkpoint {str(folder)!r} holds another job: {_told(stored, job)}. {_WAY_OUT}")
    except OSError as error:
        _unwritable(folder, error)
    return _sha256(json.dumps(job, sort_keys=True))


_WAY_OUT = "Pass another folder, or remove this one to begin anew."


def _stored_job(folder: Path) -> dict[str, Any] | None:
    """Return the job that the folder keeps; None without a `job.json` that can be read."""
    try:
        record: object = parse_json((folder / JOB).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    fields = cast(dict[str, Any], record)
    job = fields.get("job")
    return cast(dict[str, Any], job) if fields.get("trimtab") == "checkpoint" and isinstance(job, dict) else None


def _told(stored: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Say in which points two jobs differ; of two kinds of work that is all there is to say."""
    kinds = [of.get("work") for of in (stored, job)]
    if kinds[0] != kinds[1]:
        return f"work ({kinds[0]} there, {kinds[1]} here)"
    said = list(_differences(stored, job))
    return ", ".join(said[:MOST_DIFFERENCES]) + (f", and {n} more" if (n := len(said) - MOST_DIFFERENCES) > 0 else "")


def _differences(stored: Mapping[str, Any], job: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Yield the points in which two jobs differ, as in "layers ([0, 1] there, [0] here)"."""
    for name in dict.fromkeys([*stored, *job]):
        there, here = stored.get(name), job.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            inner = cast(Mapping[str, Any], there), cast(Mapping[str, Any], here)
            yield from _differences(*inner, f"{place}{name}: ")
        elif there != here:
            yield f"{place}{name} ({_short(there)} there, {_short(here)} here)"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text if len(text) <= 60 else f"{text[:57]}..."


def _unwritable(folder: Path, error: OSError) -> NoReturn:
    raise OptionError(
        f"Checkpoint {str(folder)!r} cannot be written: {error.strerror or error}. The steps that it holds stay "
        "usable: mend that and run the same again, or pass another folder."
    ) from None


def _name(key: str) -> str:
    """Return a file's name for a step: readable, short, and different for every key."""
    return f"step-{re.sub(r'[^A-Za-z0-9.]+', '-', key)[:80].strip('-')}-{_sha256(key)[:12]}"


def _sha256(*parts: str | bytes) -> str:
    data = [part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts]
    return hashlib.sha256(b"\0".join(data)).hexdigest()
