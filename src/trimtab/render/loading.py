"""Load a causal language model and its tokenizer: the bundled one, a local folder, or a name on the hub."""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trimtab.errors import MissingDependency, OptionError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "prefworld"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loaded(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(name_or_path: str | Path, *, dtype: str | torch.dtype = "auto", device: str | None = None) -> Loaded:
    """Load a causal language model and its tokenizer: "prefworld", a local folder, or a hub name.

    `dtype` is "auto" (as stored; the bundled model is stored in bf16 and computes in float32, which every CPU does
    well), a name such as "bfloat16", or a torch dtype. `device` is a torch device name, or
    "auto" to spread the model over all devices; None leaves it on the CPU. Weights are read from safetensors only, and
    code that comes with a model is never run. Raises `OptionError` when there is no such model
    or device.
    """
    if not isinstance(name_or_path, str | Path) or not str(name_or_path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"A model is named by text or a path; got {name_or_path!r}.")
    if isinstance(dtype, str) and dtype != "auto" and dtype not in DTYPES:
        raise OptionError(f"Unknown dtype {dtype!r}. Known: auto, {', '.join(sorted(DTYPES))}.")
    config = load_config(name_or_path)
    source, local = locate(name_or_path)
    if str(name_or_path) == BUNDLED and dtype == "auto":
        dtype = "float32"
    if device == "auto" and find_spec("accelerate") is None:
        raise MissingDependency("device='auto' needs accelerate. Install it with: pip install accelerate")
    _check_device(device)
    tokenizer = _load_tokenizer(name_or_path)
    try:
        model = model_class(config).from_pretrained(
            source,
            dtype=DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype,
            device_map="auto" if device == "auto" else None,
            use_safetensors=True,
            local_files_only=local,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(name_or_path, error) from None
    if str(name_or_path) == BUNDLED:
        model.config.name_or_path = BUNDLED  # not the folder it happens to be installed in
    if device not in (None, "auto"):
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    return Loaded(model.eval(), tokenizer)


def load_empty(name_or_path: str | Path) -> Loaded:
    """Load a model without its weights (on torch's device "meta"), and its tokenizer; see `load`."""
    config = load_config(name_or_path)
    tokenizer = _load_tokenizer(name_or_path)
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    if str(name_or_path) == BUNDLED:
        model.config.name_or_path = BUNDLED
    return Loaded(model.eval(), tokenizer)


def _load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    source, local = locate(name_or_path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if local and not any(Path(source).glob("*token*")):
            raise OptionError(
                f"The folder {str(name_or_path)!r} holds a model and no tokenizer, such as tokenizer.json. Save it "
                "there too: tokenizer.save_pretrained(FOLDER)."
            ) from None
        raise _cannot_load(name_or_path, error) from None


def _check_device(device: str | None) -> None:
    if device in (None, "auto"):
        return
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("tensors there have no values.")
    except (RuntimeError, AssertionError, TypeError) as error:  # a torch without CUDA asserts that it has it
        said = str(error).splitlines()[0].rstrip(".")
        raise OptionError(f"Cannot use device={device!r}: {said}. Leave it out, or pass 'cpu'.") from None


def load_config(name_or_path: str | Path) -> PretrainedConfig:
    """Load the configuration of a model that `load` could load; raises `OptionError` when there is no such model."""
    source, local = locate(name_or_path)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(name_or_path, error) from None


def model_class(config: PretrainedConfig) -> Any:
    """Return the automatic class of transformers that makes the model: of text, or of text and images."""
    text, images = _classes()
    return text if type(config) in text._model_mapping else images


def has_model_class(config: PretrainedConfig) -> bool:
    """Tell whether transformers makes a causal language model of such a configuration."""
    return any(type(config) in known._model_mapping for known in _classes())


def _classes() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM, AutoModelForImageTextToText  # their mappings are not public, and the only lists


def _cannot_load(name_or_path: str | Path, error: Exception) -> OptionError:
    reason = str(error).strip().split("\n")[0]
    near = difflib.get_close_matches(str(name_or_path), [BUNDLED], n=1)
    hint = f" Did you mean {BUNDLED!r}, the bundled model?" if near else ""
    if not locate(name_or_path).is_local:
        hint += " There is no such folder here, so it was taken for a name on the hub."
    return OptionError(f"Cannot load a model from {str(name_or_path)!r}: {reason}{hint}")


class Source(NamedTuple):
    """A folder, or a hub name."""

    name: str
    is_local: bool


def locate(name_or_path: str | Path) -> Source:
    """Return what transformers calls a model, and whether it lies here; raises `OptionError` for an empty folder."""
    text = str(name_or_path)
    if text == BUNDLED:
        folder = resources.files("trimtab") / "prefworld" / "model"
        if not (folder / "config.json").is_file():
            raise OptionError(
                "The bundled model 'prefworld' is not in this installation. Build it with "
                "`python -m trimtab.prefworld.build`, or load another model by its folder or hub name."
            )
        return Source(str(folder), True)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OptionError(f"The folder {text!r} holds no config.json, so it is not a saved model.")
        return Source(str(path), True)
    if path.is_file():
        raise OptionError(f"{text!r} is a file; a model is loaded from its folder.")
    looks_like_path = isinstance(name_or_path, Path) or text.startswith(("/", ".", "~", "\\")) or text.count("/") > 1
    if looks_like_path or not text:
        raise OptionError(f"There is no folder {text!r}. Pass 'prefworld', a folder with config.json, or a hub name.")
    return Source(text, False)
