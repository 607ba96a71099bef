"""Knobs in the lm-evaluation-harness: its model type `trimtab`, and its command line with that type in it.

`python -m trimtab.evals.lm_eval run --model trimtab --model_args pretrained=prefworld,knob=FILE,strength=1 --tasks ...`
is the harness's own command. In Python, importing this module makes `simple_evaluate(model="trimtab", ...)` work.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import Panel, Rack, load_knob, load_panel, model_identity
from trimtab.errors import MissingDependency, OptionError, TrimtabError, TrimtabWarning, unknown_name
from trimtab.prompts import end_ids
from trimtab.render import Renderer, load
from trimtab.runtime import steer
from trimtab.types import check_strength

try:  # a class needs its base when it is made, so that this module, a plug-in of the harness, imports it at once
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    needs = f"trimtab.evals.lm_eval needs lm-eval with its part for transformers ({error})."
    raise MissingDependency(f"{needs} Install it with: pip install 'lm-eval[hf]'") from None

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts of context and continuation (None where a whole text is scored in windows), and their ids."""
Answer = tuple[float, bool]
"""The log-likelihood of a continuation in nats, and whether greedy decoding would give it."""


class _Row(NamedTuple):
    """What the model is given of a request, which is all but its last id, and how many of these are the prompt."""

    ids: tuple[int, ...]
    prompt: int


_Base: Any = HFLM  # whose type is lost on a type checker: it went through the decorator that registers it


class TrimtabLM(_Base):
    """A causal language model under knobs, as the harness runs models of transformers.

    A knob acts where it does in Trimtab: the prompt of a request ends where its context ends, and a text that is scored
    as a whole (`loglikelihood_rolling`) has no prompt but its first token. What is scored, and how answers are cut, is
    the harness's own.
    """

    add_bos_token: bool | None

    def __init__(
        self,
        *,
        pretrained: str,
        knob: str | Path | None = None,
        panel: str | Path | None = None,
        strength: float | None = None,
        strict: bool = True,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        truncation: bool = False,
        logits_cache: bool = True,
        softmax_dtype: str | torch.dtype | None = "float32",
        mixed_precision_dtype: str | torch.dtype | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ) -> None:
        """Load a model by `trimtab.load`, and the knobs that stay on it.

        `knob` is a file, at `strength` (1 unless given); `panel` is a file of knobs with strengths; with neither the
        model is bare. `strict=False` warns of a knob from another architecture or chat template, and does not refuse
        it. A CUDA device that is not there becomes the CPU, as in the harness, whose command line asks for cuda:0
        unless told otherwise. The rest are options of the harness's `hf`; `softmax_dtype` differs in its default, which
        there rounds the log-likelihoods of a half-precision model to half precision.

        Raises `OptionError` for options that contradict each other and where a model cannot be loaded, and `KnobError`
        for a knob that cannot be read or does not fit.
        """
        chosen = _panel(knob, panel, strength)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None
        model, tokenizer = load(pretrained, dtype=dtype, device=device)
        for one in chosen.rack.values():
            one.check(model, tokenizer, strict=strict)
        super().__init__(
            model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            truncation=truncation,
            logits_cache=logits_cache,
            softmax_dtype=softmax_dtype,
            mixed_precision_dtype=mixed_precision_dtype,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )
        self._adapter, self._panel = Adapter(model), chosen
        self._dose, self._markers = chosen.rack.resolve(chosen.setting), Renderer(tokenizer).thinking()
        self._rendered: set[str] = set()
        with self._steered(None):  # what cannot be steered is said now, and not at the first request
            pass

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> TrimtabLM:
        """Read `--model_args` as text; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> TrimtabLM:
        """Make the model that `--model_args` and the harness's own options name.

        Raises `UnknownName` for an argument that is not one of the constructor's, such as those by which `hf` loads
        models, and `OptionError` for one that is given in both places, or for a missing `pretrained`.
        """
        known = list(inspect.signature(cls).parameters)
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        for name in arg_dict:
            if name not in known:
                raise unknown_name("model argument", name, known)
            if name in options:
                raise OptionError(
                    f"{name} is given twice: {arg_dict[name]!r} in model_args, and {options[name]!r} as an option of "
                    "the harness. Pass it as the option alone."
                )
        if "pretrained" not in arg_dict:
            raise OptionError("model_args name no model. Add pretrained=prefworld, a folder, or a hub name.")
        return cls(**arg_dict, **options)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results: the model, and its knobs with strengths and origins."""
        identity = model_identity(self.model, hashes=False)
        knobs: dict[str, dict[str, Any]] = {}
        for name, strength in self._panel.setting.items():
            knob = self._panel.rack[name]
            applied = {
                "strength": strength,
                "gain": knob.gain,
                "site": str(getattr(knob, "site", "weights")),
                "where": knob.where,
            }
            knobs[name] = {**applied, "method": knob.method, "pairs_hash": knob.provenance.get("pairs_hash")}
        return {
            "model_name": identity["model"],
            "model_sha": identity["revision"] or "",
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_device": str(self.device),
            "knobs": knobs,
        }

    # Text to ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation, as the harness does; it is encoded as it stands, with nothing put before it."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        self._rendered.add(text)
        return text

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode texts to generate from: ids and mask `[B, T]`."""
        with self._as_it_stands(strings[0]):
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        with self._as_it_stands(context):
            return super()._encode_pair(context, continuation)

    @contextmanager
    def _as_it_stands(self, text: str) -> Generator[None]:
        """Encode a text that a chat template has rendered without what the tokenizer would put before it.

        The harness sees to this where the template itself begins with BOS, and not where it begins with anything else.
        """
        given = self.add_bos_token
        if given is None and text in self._rendered:
            self.add_bos_token = False
        try:
            yield
        finally:
            self.add_bos_token = given

    # Requests

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        lengths = generation_kwargs["attention_mask"].sum(1).tolist()
        # The harness stops at the tokenizer's EOS when all rows have come to it; a row must, or its text goes on.
        generation_kwargs.setdefault("eos_token_id", end_ids(self.model, self.tokenizer) or None)
        with self._steered(lengths):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Score continuations, in batches of similar length, longest first.

        The base class hides which rows make up a batch; here they are known, and with them their prompts' ends.
        Requests that give the model the same ids share a row only if their prompts end at the same token.
        """
        rows: dict[_Row | int, tuple[_Row, list[int]]] = {}
        for number, row in enumerate(self._rows(requests)):
            key = row if self.logits_cache else number
            rows.setdefault(key, (row, []))[1].append(number)
        order = sorted(rows.values(), key=lambda entry: (-len(entry[0].ids), entry[0]))
        answers: dict[int, Answer] = {}
        if self.batch_size == "auto" and not override_bs:
            self.batch_sizes = {}  # those found for other requests, which may have been shorter
        longest = [requests[numbers[0]] for _, numbers in order]
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring continuations") as bar:
            start = 0
            while start < len(order):
                batch = order[start : start + self._rows_at_once(start, longest, override_bs)]
                for (row, numbers), logits in zip(batch, self._logits([row for row, _ in batch]), strict=True):
                    for number in numbers:
                        text, _, continuation = requests[number]
                        answers[number] = self._score(logits[: len(row.ids)], continuation)
                        if text is not None:
                            self.cache_hook.add_partial("loglikelihood", text, answers[number])
                        bar.update()
                start += len(batch)
        return [answers[number] for number in range(len(requests))]

    def _rows(self, requests: Sequence[Request]) -> list[_Row]:
        """Return what is run for each request, cut on the left where it is longer than the model's context."""
        rows: list[_Row] = []
        cuts: list[int] = []
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise OptionError(
                    f"A continuation has 1 to {self.max_length} tokens, the model's max_length; got "
                    f"{len(continuation)}, for {text!r}."
                )
            whole = context + continuation
            cuts.append(max(0, len(whole) - self.max_length - 1))
            # Of a text that is scored in windows, every token is said by the model, whatever window it is in.
            end = 1 if text is None else self._prompt_end(text[0], context, whole)
            rows.append(_Row(tuple(whole[cuts[-1] : -1]), max(1, min(end, len(whole) - 1) - cuts[-1])))
        if any(cuts):
            warnings.warn(
                f"{sum(map(bool, cuts))} of {len(requests)} texts are longer than max_length={self.max_length}; they "
                f"were cut on the left, by {max(cuts)} tokens at most.",
                TrimtabWarning,
                stacklevel=4,
            )
        return rows

    def _prompt_end(self, context: str, ids: list[int], whole: list[int]) -> int:
        """Count the prompt's tokens: white space at a context's end, which the harness scores, is the prompt's too."""
        if context == context.rstrip():
            return len(ids)
        with self._as_it_stands(context):
            full = self.tok_encode(context)
        return len(full) if whole[: len(full)] == full else len(ids)

    def _rows_at_once(self, start: int, requests: list[Request], override: int | None) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        return override or self._batch_scheduler(start, requests)

    def _logits(self, rows: Sequence[_Row]) -> Tensor:
        """Run rows in one batch, padded on the right: `[B, T, V]`."""
        batch = Renderer(self.tokenizer).pad([row.ids for row in rows], side="right")
        with self._steered([row.prompt for row in rows]):
            return self._model_call(batch.input_ids.to(self._adapter.input_device))

    def _score(self, logits: Tensor, continuation: list[int]) -> Answer:
        """Score a continuation by the last of a row's logits `[T, V]`."""
        ids = torch.tensor(continuation, device=logits.device)
        logps = logits[-len(ids) :].log_softmax(-1, dtype=self.softmax_dtype)
        return float(logps.gather(-1, ids[:, None]).sum()), bool((logps.argmax(-1) == ids).all())

    @contextmanager
    def _steered(self, lengths: Sequence[int] | None) -> Generator[None]:
        with steer(self._adapter, self._dose, prompt_lengths=lengths, thinking=self._markers):
            yield


register_model("trimtab")(TrimtabLM)


def _panel(knob: str | Path | None, panel: str | Path | None, strength: float | None) -> Panel:
    """Load the knobs that the options name, with their strengths."""
    if knob is not None and panel is not None:
        raise OptionError(f"Got knob={str(knob)!r} and panel={str(panel)!r}. Pass one; a panel holds several knobs.")
    if knob is None and strength is not None:
        found = "a panel has strengths of its own" if panel is not None else "there is no knob"
        raise OptionError(f"Got strength={strength!r}, and {found}. Pass strength with knob=FILE.")
    if panel is not None:
        return load_panel(panel)
    if knob is None:
        return Panel(Rack(), {})
    loaded = load_knob(knob)
    return Panel(Rack(**{loaded.name: loaded}), {loaded.name: check_strength(1.0 if strength is None else strength)})


def main() -> int:
    """Run the command line of the harness, which knows the model type `trimtab`; returns an exit status."""
    try:
        cli_evaluate()
    except TrimtabError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
