"""Find the list of decoder blocks in the text part of any causal language model, or refuse to guess."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from trimtab.errors import AdapterError


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuse the prompt, prefix and P-tuning of PEFT: positions would count tokens that no text has."""
    config = cast(Any, getattr(model, "active_peft_config", None))  # of a PeftModel
    if getattr(config, "is_prompt_learning", False):
        kind, count = getattr(config.peft_type, "value", config.peft_type), config.num_virtual_tokens
        raise AdapterError(
            f"This {type(model).__name__} puts {count} virtual tokens before every prompt ({kind}), so that positions "
            "are not those of the text. Use model.get_base_model(), or an adapter that adds no tokens, such as LoRA."
        )


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the model's text part, or None if the model has no configuration."""
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return cast(Any, config).get_text_config()
    except ValueError as error:
        raise AdapterError(f"The configuration of {type(model).__name__} has several text parts: {error}") from error


def rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary embeddings that a configuration names, of all kinds of its layers."""
    rope: object = getattr(config, "rope_parameters", None)
    settings = cast(Mapping[str, Any], rope) if isinstance(rope, Mapping) else {}
    kinds = (settings, *(kind for kind in settings.values() if isinstance(kind, Mapping)))
    return {str(kind["rope_type"]) for kind in kinds if "rope_type" in kind}


def stretch(config: Any, window: int) -> int:
    """Return by how much scaled rotary embeddings reach beyond the `window` that a configuration names; 1 where not.

    YaRN's configurations mostly name the stretched window, and some the original one.
    """
    rope: object = getattr(config, "rope_parameters", None)
    scaled = cast(Mapping[str, Any], rope) if isinstance(rope, Mapping) else {}
    if scaled.get("rope_type") not in ("yarn", "dynamic", "linear"):
        return 1
    if scaled.get("original_max_position_embeddings") not in (None, window):
        return 1
    return int(scaled.get("factor") or 1)


def find_blocks(model: nn.Module) -> str:
    """Return the path of the only `ModuleList` in the text part that has one entry per hidden layer."""
    name = type(model).__name__
    config = text_config(model)
    count = getattr(config, "num_hidden_layers", None)
    lists = _outer_lists(model)
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(f"{name} is an encoder-decoder model; Trimtab works on decoder-only models.")
    get_decoder = getattr(model, "get_decoder", None)
    text = get_decoder() if callable(get_decoder) else model
    inside = {id(blocks) for blocks in _outer_lists(text).values()} if isinstance(text, nn.Module) else set[int]()
    if not any(id(blocks) in inside for blocks in lists.values()):  # some call the LM head their decoder
        inside = {id(blocks) for blocks in lists.values()}
    fitting = [path for path, blocks in lists.items() if len(blocks) == count and id(blocks) in inside]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{path} ({len(blocks)})" for path, blocks in lists.items()) or "none"
    problem = "Cannot find" if not fitting else "Cannot choose"
    wanted = f" of {count} blocks" if isinstance(count, int) else ""
    raise AdapterError(f'{problem} the decoder layers{wanted} in {name}. Candidates: {found}. Pass layers_path="...".')


def _outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return every `ModuleList` with its path, those nested in another left out (the experts of a block, say)."""
    lists: dict[str, nn.ModuleList] = {}
    seen: set[nn.Module] = set()

    def visit(path: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, nn.ModuleList):
            lists[path] = module
            return
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return lists


def module_list(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    """Return the blocks at a path; raises `AdapterError` with the lists that there are."""
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        known = ", ".join(_outer_lists(model)) or "none"
        raise AdapterError(f"{type(model).__name__} has no list of layers at {path!r}. Lists: {known}.")
    return blocks


def callers_of(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules above the blocks that have a `forward`, outermost first; the last is the decoder."""
    names = path.split(".")
    above = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    # containers such as ModuleDict have none of their own
    return [module for module in above if type(module).forward is not nn.Module.forward] or [model]
