"""In the front end's process: settings are completed at start, and every request is checked before it goes on."""

from __future__ import annotations

import asyncio
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from trimtab.artifact import AnyKnob, DeltaKnob, Knob
from trimtab.artifact import load_knob as read_knob
from trimtab.artifact.checks import check_knob_name
from trimtab.artifact.identity import compare_identity
from trimtab.engines.admission import ADAPTER, Admission, Admitted, adapter_name, engine_digest, top_rank
from trimtab.engines.vllm import compat
from trimtab.engines.vllm.settings import KEY, REQUESTED, Settings
from trimtab.errors import KnobError, OptionError, TrimtabError, TrimtabWarning
from trimtab.render.loading import model_class

UNSUPPORTED: dict[str, tuple[object, str]] = {
    "parallel_config.prefill_context_parallel_size": (1, "prefill context parallelism computes a prompt in pieces"),
    "parallel_config.use_ubatching": (False, "micro-batches and dual batch overlap compute a step in pieces"),
    "cache_config.kv_sharing_fast_prefill": (False, "fast prefill leaves tokens out in some layers"),
    "kv_transfer_config": (None, "other KV caches (connectors) may not tell blocks apart by what was added to them"),
}
"""Options of vLLM's with which a layer would not be told which tokens it has, or a cache not what they are."""


def refuse(error: TrimtabError) -> Callable[..., Any]:
    """Return the wrapper that refuses engines with knobs, and leaves others alone."""

    def configure_none(original: Callable[..., Any], args: Any, *rest: Any, **options: Any) -> Any:
        if Settings.read(args.additional_config) is not None:
            raise error
        return original(args, *rest, **options)

    return configure_none


def configure(original: Callable[..., Any], args: Any, *rest: Any, **options: Any) -> Any:
    """Complete and check the settings of an engine with knobs; raises `TrimtabError` for what it cannot run."""
    config = original(args, *rest, **options)
    settings = Settings.read(config.additional_config)
    if settings is None:
        return config
    for option, (off, reason) in UNSUPPORTED.items():
        value = config
        for part in option.split("."):
            value = getattr(value, part)
        if value != off:
            raise OptionError(f"Knobs do not go with {option.rpartition('.')[2]}={value!r}: {reason}.")
    if compat.bypasses_front():
        raise OptionError("Knobs do not go with VLLM_USE_RUST_FRONTEND=1, which does not ask plugins about requests.")
    if max(settings.layers or [0]) >= config.model_config.hf_text_config.num_hidden_layers:
        raise OptionError(f"layers={settings.layers} names a layer that this model has not.")
    settings.knobs = {name: os.path.abspath(path) for name, path in settings.knobs.items()}
    front = Front(config, settings)  # which reads and checks every knob
    settings.digests = dict(front.admission.digests)
    settings.put_into(config)
    return config


class Front:
    """The knobs of an engine in its front end; `config` is vLLM's `VllmConfig`."""

    def __init__(self, config: Any, settings: Settings) -> None:
        self.settings = settings
        self._model_config = config.model_config
        self._twin: tuple[nn.Module | None, Any] | None = None
        lora = config.lora_config
        self.admission = Admission(
            dtype=config.model_config.dtype,
            max_rank=None if lora is None else lora.max_lora_rank,
            dose=settings.dose,
        )
        self._mixed_up = lora is not None and compat.mixes_up_adapters()
        self._replicas: int = config.parallel_config.data_parallel_size
        for name, path in settings.knobs.items():
            digest = self.admission.put(name, self.read(path))
            if settings.digests.get(name, digest) != digest:
                raise KnobError(f"{path} holds another knob than the one that the engine was started with.")

    def read(self, path: str) -> AnyKnob:
        """Read a knob file, and compare the knob with the model; raises `KnobError` where it does not fit."""
        knob = read_knob(path)
        self.admission.check(knob)
        self._compare(knob)
        if isinstance(knob, DeltaKnob) and top_rank(knob) > (self.admission.max_rank or 0):
            raise KnobError(
                f"Knob {knob.name!r} has rank {top_rank(knob)}; this engine runs adapters up to rank "
                f"{self.admission.max_rank} (max_lora_rank)."
            )
        if isinstance(knob, Knob) and self.settings.layers is not None:
            other = [site.layer for site in knob.sites if site.layer not in self.settings.layers]
            if other:
                raise KnobError(
                    f"Knob {knob.name!r} acts on layer {other[0]}; this engine was started for layers "
                    f"{self.settings.layers} (layers)."
                )
        return knob

    def read_new(self, name: str, path: str) -> AnyKnob:
        """Read a knob for an engine that runs; raises `OptionError` where not all of its workers could be asked."""
        check_knob_name(name)
        if self._replicas > 1:
            raise OptionError("An engine of several replicas (data parallel) loads knobs at its start only.")
        return self.read(path)

    @property
    def unadapted(self) -> str:
        """The adapter of requests that have none, where vLLM would give them another's; empty elsewhere."""
        weights = self._mixed_up and any(isinstance(knob, DeltaKnob) for knob in self.admission.knobs.values())
        return ADAPTER if weights else ""

    def _compare(self, knob: AnyKnob) -> None:
        """Compare a knob with the model, as `Knob.check` does; the model's weights are not needed for it."""
        config = self._model_config.hf_text_config
        width, count = self._model_config.get_hidden_size(), config.num_hidden_layers
        top = max(site.layer for site in knob.sites) if isinstance(knob, Knob) else 0
        if isinstance(knob, Knob) and (knob.width != width or top >= count):
            raise KnobError(
                f"Knob {knob.name!r} has width {knob.width} and acts on layer {top}; this model has hidden "
                f"size {width} and {count} layers. Learn the knob on this model."
            )
        if self._twin is None:
            self._twin = _empty_twin(self._model_config)
        model, tokenizer = self._twin
        if model is None:
            warnings.warn(
                f"transformers cannot build this model, so that of knob {knob.name!r} only the sizes were compared.",
                TrimtabWarning,
                stacklevel=2,
            )
            return
        strict = self.settings.strict
        if not isinstance(knob, DeltaKnob):
            knob.check(cast(Any, model), tokenizer, strict=strict, hashes=False)
        else:
            knob.check_shapes(model, loaded=False)
            compare_identity(knob.name, knob.provenance, cast(Any, model), tokenizer, strict=strict, hashes=False)
            foreign = next((n for n in knob.parts if not _is_plain_linear(model, n)), None)
            if foreign is not None:
                raise KnobError(f"Knob {knob.name!r} changes {foreign!r}, no linear layer, which no adapter can.")

    def admit(self, params: Any) -> Admitted | None:
        """Check what a request asks for."""
        extra = getattr(params, "extra_args", None) or {}
        if KEY in extra:
            raise OptionError(f"{KEY!r} is not for requests to pass. Pass {REQUESTED!r}.")
        return self.admission.admit(extra[REQUESTED]) if extra.get(REQUESTED) is not None else None


def _is_plain_linear(model: nn.Module, name: str) -> bool:
    path, _, kind = name.rpartition(".")
    return kind == "weight" and isinstance(model.get_submodule(path), nn.Linear)


def _empty_twin(model_config: Any) -> tuple[nn.Module | None, Any]:
    """Return the model without weights, and its tokenizer, as transformers makes them; None for what it cannot."""
    from transformers import AutoTokenizer

    trust = {"trust_remote_code": model_config.trust_remote_code}
    try:
        with torch.device("meta"):
            model = model_class(model_config.hf_config).from_config(model_config.hf_config, **trust)
    except (ValueError, KeyError, ImportError, AttributeError):  # one of vLLM's own
        return None, None
    if model_config.skip_tokenizer_init:
        return model, None
    place, revision = model_config.tokenizer, model_config.tokenizer_revision
    return model, AutoTokenizer.from_pretrained(place, revision=revision, **trust)


def open_front(original: Callable[..., Any], processor: Any, vllm_config: Any, *rest: Any, **options: Any) -> None:
    """Give the processor of inputs the engine's knobs."""
    original(processor, vllm_config, *rest, **options)
    settings = Settings.of(vllm_config)
    processor.trimtab = None if settings is None else Front(vllm_config, settings)


def admit(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Look up a request's knobs, and let what they come to travel with it; a mistake refuses this request alone."""
    call = inspect.signature(original).bind(*args, **options)
    processor, params = call.arguments["self"], call.arguments["params"]
    front: Front | None = getattr(processor, "trimtab", None)
    extra: Mapping[str, Any] = getattr(params, "extra_args", None) or {}
    asked = REQUESTED in extra or KEY in extra
    if not asked and (front is None or not front.unadapted):
        return original(*call.args, **call.kwargs)
    try:
        if front is None:
            raise OptionError(
                'This engine was started without knobs. Start it with additional_config={"trimtab": {"knobs": {...}}}.'
            )
        if asked and call.arguments.get("resumable"):
            raise OptionError("A session fed in parts takes no knobs: vLLM keys its blocks before it knows them.")
        admitted = front.admit(params)
        adapter = admitted.adapter if admitted is not None else ""
        if call.arguments.get("lora_request") is None:
            adapter = adapter or front.unadapted
        elif adapter:
            raise OptionError("A request runs one adapter: turn weight knobs, or name an adapter of the engine's.")
        if adapter:
            name, number = adapter_name(adapter)
            call.arguments["lora_request"] = compat.vllm("vllm.lora.request", "LoRARequest")(name, number, adapter)
    except TrimtabError as error:
        raise compat.vllm("vllm.exceptions", "VLLMValidationError")(str(error), parameter=REQUESTED) from None
    request = original(*call.args, **call.kwargs)
    if admitted is not None:  # on the request's own copy of the parameters
        request.sampling_params.extra_args = {**extra, KEY: admitted.stamp()}
    return request


# Loading while the engine runs


def load_knob(engine: Any, name: str, path: str | os.PathLike[str]) -> None:
    """Load a knob file into a running `vllm.LLM`, under a name, in the place of whatever had it.

    Every process of the engine reads the file, on its own machine; requests in flight keep the knob they came with.
    Raises `KnobError` for a file that cannot be read, or does not fit, in any of them, and `OptionError` for an engine
    of several replicas (data parallel); the engine then goes on as it was.
    """
    front, place = front_of(engine), os.path.abspath(path)
    knob = front.read_new(name, place)
    _settle(front, name, knob, engine.collective_rpc(compat.RPC, args=(place,)))


async def load_knob_async(engine: Any, name: str, path: str | os.PathLike[str]) -> None:
    """Load a knob file into a running `AsyncLLM`, without holding up its requests; see `load_knob`."""
    front, place = front_of(engine), os.path.abspath(path)
    knob = await asyncio.to_thread(front.read_new, name, place)
    _settle(front, name, knob, await engine.collective_rpc(compat.RPC, args=(place,)))


def front_of(engine: Any) -> Front:
    """Return the knobs of an engine's front end; raises `OptionError` for an engine that was started without."""
    front = getattr(getattr(engine, "input_processor", None), "trimtab", None)
    if front is None:
        raise OptionError(
            'This engine was started without knobs. Start it with additional_config={"trimtab": {"knobs": {}}}.'
        )
    return front


def _settle(front: Front, name: str, knob: AnyKnob, answers: list[dict[str, str]]) -> None:
    wrong = next((answer["error"] for answer in answers if "error" in answer), None)
    if wrong is not None:
        raise KnobError(f"A worker cannot load the knob: {wrong}")
    if {answer["digest"] for answer in answers} != {engine_digest(knob)}:
        raise KnobError("The workers have read another knob than the front end: its file differs between machines.")
    front.admission.put(name, knob)
