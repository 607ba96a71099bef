"""In the workers: a table of addends beside the model's layers, and its rows filled before every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.artifact import AnyKnob, DeltaKnob, Knob, load_knob
from trimtab.engines.admission import ADAPTER, compose_adapter, engine_digest, read_adapter_path
from trimtab.engines.slots import Plan, Slots, plan_request
from trimtab.engines.vllm import compat
from trimtab.engines.vllm.settings import Settings, stamp_of
from trimtab.errors import AdapterError, KnobError, TrimtabError

MARGIN = 1024
"""Tokens by which a step may be padded beyond the most that are scheduled, for graphs and for ranks in step."""

_knobs: dict[str, AnyKnob] = {}
"""The knobs of this process by their digests, those among them that have lost their name: requests may be in flight."""
_hooks: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


class Steering:
    """What steers the model of one worker."""

    def __init__(self, config: Any, model: nn.Module, device: torch.device, settings: Settings) -> None:
        self._dtype: torch.dtype = config.model_config.dtype
        blocks = own_blocks(model, config.model_config.hf_text_config.num_hidden_layers)
        blocks = {i: block for i, block in blocks.items() if settings.layers is None or i in settings.layers}
        capture = config.compilation_config.cudagraph_capture_sizes or [0]
        self.slots = Slots(
            list(blocks),
            config.model_config.get_hidden_size(),
            settings=config.scheduler_config.max_num_seqs,
            tokens=max(config.scheduler_config.max_num_batched_tokens, *capture) + MARGIN,
            dtype=self._dtype,
            device=device,
        )
        # A graph that was recorded while no token was steered would steer none for ever.
        eager = bool(config.model_config.enforce_eager)
        for i, block in blocks.items():
            block.register_buffer("trimtab_table", self.slots.table[self.slots.layers[i]], persistent=False)
            block.register_buffer("trimtab_rows", self.slots.rows, persistent=False)
            if block in _hooks:  # a model that is loaded again
                _hooks.pop(block).remove()
            _hooks[block] = block.register_forward_hook(_Add(self.slots, eager))
        self._plans: dict[tuple[tuple[str, float], ...], Plan] = {}
        digests = [digest_of_file(path, model) for path in settings.knobs.values()]
        _check_alike(settings, digests)

    def plan(self, params: Any) -> Plan | None:
        """Return what a request's knobs add; None for one without."""
        stamp = stamp_of(params)
        if not stamp or not stamp["turned"]:
            return None
        key = tuple(stamp["turned"].items())
        if key not in self._plans:
            if len(self._plans) >= self.slots.table.shape[1]:
                self._plans.clear()
            turned: dict[str, tuple[Knob, float]] = {}
            for digest, strength in key:
                knob = _knobs[digest]
                assert isinstance(knob, Knob)
                turned[digest] = knob, strength
            self._plans[key] = plan_request(turned, self._dtype)
        return self._plans[key]

    def fill(
        self,
        plans: dict[str, Plan | None],
        requests: Sequence[str],
        counts: Sequence[int],
        begins: Sequence[int],
        prompts: Sequence[int],
    ) -> None:
        """Prepare the next step."""
        self.slots.sync({name: plan for name in requests if (plan := plans.get(name)) is not None})
        self.slots.fill(requests, counts, begins, prompts)


class _Add:
    """The hook of a decoder layer: adds to its output, which is one part of the residual stream where there are two."""

    def __init__(self, slots: Slots, eager: bool) -> None:
        self._slots, self._eager = slots, eager

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        if self._eager and self._slots.idle:
            return output
        table, rows = block.get_buffer("trimtab_table"), block.get_buffer("trimtab_rows")
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        parts = len(output) if isinstance(output, tuple) else 1
        flat = hidden.dim() == 2 or (hidden.dim() == 3 and hidden.shape[0] == 1)
        if parts > 2 or not flat or hidden.shape[-1] != table.shape[-1]:
            raise AdapterError(
                f"A {type(block).__name__} returns {parts} parts, the first of shape {list(hidden.shape)}: not the "
                f"residual stream, [tokens, {table.shape[-1]}], so that knobs cannot act on this model in vLLM."
            )
        hidden = hidden + table[rows[: hidden.shape[-2]]]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def own_blocks(model: nn.Module, count: int) -> dict[int, nn.Module]:
    """Return the decoder layers that this worker holds, by number, of a language model or the text part of one."""
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and not any(word in path.lower() for word in ("vision", "visual", "audio", "image"))
    }
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        found = ", ".join(outer) or "none"
        raise AdapterError(f"Cannot find the {count} decoder layers of {type(model).__name__}. Candidates: {found}.")
    # The layers of other stages of the pipeline are stand-ins.
    return {i: block for i, block in enumerate(lists[outer[0]]) if type(block).__name__ != "PPMissingLayer"}


# Knobs


def digest_of_file(path: str, model: nn.Module) -> str:
    """Read a knob file, keep the knob, and return its digest."""
    knob = load_knob(path)
    digest = engine_digest(knob)
    if isinstance(knob, DeltaKnob):
        _check_adaptable(knob, model)
    _knobs[digest] = knob
    return digest


def _check_alike(settings: Settings, digests: list[str]) -> None:
    """Raise `KnobError` unless this worker has read what the front end has."""
    for (name, path), digest in zip(settings.knobs.items(), digests, strict=True):
        if settings.digests.get(name, digest) != digest:
            raise KnobError(f"Knob {name!r} is another one on this machine: {path} differs from the front end's.")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    group = compat.vllm("vllm.distributed", "get_world_group")()
    if group.world_size > 1:
        found: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(found, dict(zip(settings.knobs, digests, strict=True)), group.cpu_group)
        if any(theirs != found[0] for theirs in found):
            other = sorted({item for theirs in found for item in theirs.items() ^ found[0].items()})
            raise KnobError(f"The machines of this engine hold other knobs under the name {other[0][0]!r}.")


def _check_adaptable(knob: DeltaKnob, model: nn.Module) -> None:
    """Raise `KnobError` for a weight that this engine cannot adapt, as vLLM finds out only when a request is there."""
    layer_class = compat.vllm("vllm.lora.layers", "BaseLayerWithLoRA")
    packed = {part: whole for whole, parts in getattr(model, "packed_modules_mapping", {}).items() for part in parts}
    here = dict(model.named_modules())
    adaptable = {_in_layers(path) for path, module in here.items() if isinstance(module, layer_class)}
    elsewhere = [f"{_in_layers(path)}." for path, module in here.items() if type(module).__name__ == "PPMissingLayer"]
    for name in knob.parts:
        path, _, last = name.removesuffix(".weight").rpartition(".")
        place = _in_layers(f"{path}.{packed.get(last, last)}")
        if place not in adaptable and not place.startswith(tuple(elsewhere)):
            raise KnobError(f"Knob {knob.name!r} changes {name!r}, which vLLM's adapters cannot in this model.")


def _in_layers(path: str) -> str:
    """Return a path from the list of layers on: what stands before differs between vLLM and transformers."""
    return path[path.find("layers.") :] if "layers." in path else path


def receive_knob(worker: Any, path: str) -> dict[str, str]:
    """Load a knob file into a running worker, as its front end has asked every worker to."""
    try:
        return {"digest": digest_of_file(path, worker.get_model())}
    except TrimtabError as error:
        return {"error": str(error)}


def load_adapter(original: Callable[..., Any], manager: Any, lora_request: Any) -> Any:
    """Compose the adapter of weight knobs at their alphas, and leave others to vLLM."""
    if not lora_request.lora_path.startswith(ADAPTER):
        return original(manager, lora_request)
    alphas: list[tuple[DeltaKnob, float]] = []
    for digest, alpha in read_adapter_path(lora_request.lora_path).items():
        knob = _knobs[digest]
        assert isinstance(knob, DeltaKnob)
        alphas.append((knob, alpha))
    if not alphas:  # the adapter of requests without: zeros, in the shape of any other
        alphas = [(next(knob for knob in _knobs.values() if isinstance(knob, DeltaKnob)), 0.0)]
    dtype = manager.lora_config.lora_dtype
    rank, parts = compose_adapter(alphas, dtype)
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in parts.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    helper = compat.vllm("vllm.lora.peft_helper", "PEFTHelper")
    mapper = getattr(manager._adapter_manager.model, "hf_to_vllm_mapper", None)
    made = compat.vllm("vllm.lora.lora_model", "LoRAModel.from_lora_tensors")(
        lora_model_id=lora_request.lora_int_id,
        tensors=tensors,
        peft_helper=helper(r=rank, lora_alpha=rank, target_modules=sorted({m.rpartition(".")[2] for m in parts})),
        device="cpu",
        dtype=dtype,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
    )
    made.is_3d_lora_weight = False
    return made


# The first model runner (V1)


def load_first_runner(original: Callable[..., Any], runner: Any, *args: Any, **options: Any) -> None:
    """Load the model, and put the tables beside its layers."""
    original(runner, *args, **options)
    settings = Settings.of(runner.vllm_config)
    if settings is not None:
        runner.trimtab = Steering(runner.vllm_config, runner.get_model(), runner.device, settings)


def fill_first_runner(
    original: Callable[..., Any], runner: Any, scheduler_output: Any, *args: Any, **options: Any
) -> Any:
    """Prepare a step of the first runner, whose batch is final by then."""
    prepared = original(runner, scheduler_output, *args, **options)
    steering: Steering | None = getattr(runner, "trimtab", None)
    if steering is not None:
        batch = runner.input_batch
        requests = list(batch.req_ids[: batch.num_reqs])
        steering.fill(
            {name: steering.plan(runner.requests[name].sampling_params) for name in requests},
            requests,
            [scheduler_output.num_scheduled_tokens[name] for name in requests],
            batch.num_computed_tokens_cpu[: batch.num_reqs],
            batch.num_prompt_tokens[: batch.num_reqs],
        )
    return prepared


# The second model runner (V2)


def extend_model_state(original: Callable[..., Any], vllm_config: Any, model: nn.Module) -> type[Any]:
    """Return the model's own state class with knobs, which the second runner asks at every turn."""
    resolved: type[Any] = original(vllm_config, model)
    settings = Settings.of(vllm_config)
    return resolved if settings is None else steered_state(resolved, settings)


def steered_state(resolved: type[Any], settings: Settings) -> type[Any]:
    """Return a subclass of a model state that fills the rows of every step."""

    class SteeredState(resolved):
        def __init__(self, vllm_config: Any, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            self._steering = Steering(vllm_config, model, device, settings)
            self._plans: dict[str, Plan | None] = {}
            self._prompts: dict[str, int] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self._plans[new_req_data.req_id] = self._steering.plan(new_req_data.sampling_params)
            self._prompts[new_req_data.req_id] = new_req_data.prompt_len

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self._plans.pop(req_id, None)
            self._prompts.pop(req_id, None)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            requests: list[str] = list(input_batch.req_ids[: input_batch.num_reqs])
            self._steering.fill(
                self._plans,
                requests,
                input_batch.num_scheduled_tokens[: input_batch.num_reqs],
                input_batch.num_computed_tokens_np[: input_batch.num_reqs],
                [self._prompts.get(name, 1) for name in requests],  # those of a dry run are nobody's
            )
            return super().prepare_inputs(input_batch, req_states)

    return SteeredState
