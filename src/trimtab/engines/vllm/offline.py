"""Batches of prompts through vLLM, each with a setting of its own: what `trimtab.generate` does, by another engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trimtab.artifact import Rack
from trimtab.engines.admission import DosePolicy
from trimtab.engines.vllm import compat
from trimtab.engines.vllm.front import front_of, load_knob
from trimtab.engines.vllm.launch import Files, engine_options, model_options
from trimtab.engines.vllm.settings import REQUESTED
from trimtab.errors import OptionError, brief
from trimtab.generate import Generation, finished_answer
from trimtab.prompts import Prompt, check_decoding, end_tokens, read_prompts, settings_per_prompt
from trimtab.render import Renderer
from trimtab.types import Setting


class Engine:
    """A model in vLLM with a rack of knobs; use it as a context, which stops the engine's processes at its end.

    `options` go to `vllm.LLM`, whose defaults hold: `tensor_parallel_size`, `max_model_len`, `enforce_eager` and so on.
    Weight knobs run as adapters, for which `enable_lora`, `max_lora_rank` and `max_loras` are set where the options do
    not: one adapter per setting that is in flight. `strict=False` turns a knob from another architecture or chat
    template into a warning, `dose` says what becomes of strengths outside a knob's safe range, and `layers` are those
    that knobs may act on, all unless given.

    Raises `MissingDependency` without vLLM, `AdapterError` for a version of vLLM in which a seam has moved, `KnobError`
    for a knob that does not fit, `OptionError` and `UnknownName` for options that vLLM has not.
    """

    def __init__(
        self,
        model: str | Path,
        rack: Rack | None = None,
        *,
        strict: bool = True,
        dose: DosePolicy = "free",
        layers: Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if rack is not None and not isinstance(rack, Rack):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"rack is a Rack of named knobs; got {type(rack).__name__}. Pass Rack(NAME=knob).")
        make, held, own = compat.vllm("vllm", "LLM"), rack or Rack(), options or {}
        if not isinstance(own, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"options are a mapping, as in {{'max_model_len': 4096}}; got {brief(own)}.")
        for name in own:
            compat.check_option(name)
        self._files = Files(held)
        settings = {
            "knobs": self._files.paths,
            "strict": strict,
            "dose": dose,
            "layers": None if layers is None else list(layers),
        }
        source, dtype = model_options(model)
        self._open = True
        self.llm: Any = make(model=source, **engine_options(held, settings, {**dtype, **own}))
        """The `vllm.LLM`; its requests turn knobs by `SamplingParams(extra_args={"knobs": "math=0.8"})`."""

    def load(self, name: str, path: str | Path) -> None:
        """Load a knob file under a name; see `load_knob`."""
        load_knob(self.llm, name, path)

    @property
    def knobs(self) -> list[str]:
        """Names of the knobs that requests may turn."""
        return list(front_of(self.llm).admission.knobs)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        knobs: Setting | str | Sequence[Setting | str] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Generation]:
        """Answer every prompt, in the order given, all of them in flight together; see `trimtab.generate`.

        Raises `OptionError` and `UnknownName` before any prompt is answered. Above temperature 0, answers depend on
        the seed and the prompt's place, and are others than those of transformers.
        """
        if not self._open:
            raise OptionError("This engine was closed. Start another.")
        check_decoding(max_new_tokens, temperature, top_p, seed)
        tokenizer = self.llm.get_tokenizer()
        renderer, front = Renderer(tokenizer), front_of(self.llm)
        conversations = read_prompts(prompts)
        ids = [renderer.prompt_ids(messages) for messages in conversations]
        config = self.llm.llm_engine.model_config
        limit = config.max_model_len
        longest = max(range(len(ids)), key=lambda i: len(ids[i]), default=None)
        if longest is not None and len(ids[longest]) >= limit:
            raise OptionError(
                f"Prompt {longest + 1} is {len(ids[longest])} tokens long when rendered; this engine's context holds "
                f"{limit}, the answer included. Shorten it."
            )
        settings = settings_per_prompt(knobs, len(ids))
        for setting in settings:
            front.admission.admit(dict(setting))
        ends = end_tokens(tokenizer, config.try_get_generation_config().get("eos_token_id"))
        params = compat.vllm("vllm", "SamplingParams")
        sampling = [
            params(
                temperature=temperature,
                top_p=top_p,
                max_tokens=min(max_new_tokens, limit - len(ids[i])),
                seed=(seed + i) % 2**63 if temperature > 0 else None,
                stop_token_ids=ends,
                extra_args={REQUESTED: dict(setting)},
            )
            for i, setting in enumerate(settings)
        ]
        made = self.llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        return [
            finished_answer(renderer, messages, list(request.outputs[0].token_ids), ends, setting)
            for messages, setting, request in zip(conversations, settings, made, strict=True)
        ]

    def close(self) -> None:
        """Stop the engine's processes, and remove its copies of the knobs."""
        self._open = False
        self.llm.llm_engine.engine_core.shutdown()
        self._files.cleanup()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
