"""Talk with a model while turning its knobs.

Answers are streamed to stdout, everything else goes to stderr; messages and commands may also be piped in, one per
line. /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.cli import options
from trimtab.cli.options import given, text_lines, unicode_text
from trimtab.cli.sources import check_knobs, load_knobs, open_model, setting_from, warn_outside
from trimtab.cli.tables import columns
from trimtab.cli.terminal import Terminal, as_options
from trimtab.errors import OptionError, TrimtabError, unknown_name
from trimtab.types import Message, Setting, format_setting, parse_setting

if TYPE_CHECKING:
    from trimtab.artifact import Rack
    from trimtab.render import Loaded

CHAT = ("temperature", "top_p", "thinking")
"""Options that go to `trimtab.generate` under their own names."""

PROMPT = "> "


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    options.add_knobs(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system line")
    options.add_decoding(parser)


def run(args: Namespace, terminal: Terminal) -> None:
    """Answer line by line until the input ends or /quit."""
    with terminal.working("Preparing"):
        panel = load_knobs(args.knob, args.where)
    setting = setting_from(args, panel)
    with open_model(args, terminal) as loaded:
        check_knobs(panel.rack, loaded, strict=not args.no_strict)
        warn_outside(panel.rack, setting)
        chat = Chat(loaded, panel.rack, setting, terminal, args)
        chat.rehearse()
        chat.show_knobs()
        if sys.stdin.isatty():
            terminal.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        for line in _lines(terminal):
            if not chat.take(line):
                break


def _lines(terminal: Terminal) -> Iterator[str]:
    """Yield what the user types; Ctrl-C drops a line, Ctrl-D ends."""
    if not sys.stdin.isatty():
        yield from text_lines(sys.stdin, "stdin")
        return
    # input() has the line editor, but would print its prompt to a stdout that is not a terminal.
    editing = sys.stdout.isatty() and not terminal.json
    if editing:
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
    while True:
        try:
            if editing:
                line = input(PROMPT)
            else:
                print(PROMPT, end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                if not line:
                    return
        except EOFError:
            terminal.note("")
            return
        except KeyboardInterrupt:
            terminal.note("\nCtrl-D or /quit leaves.")
            continue
        yield line


class Command(NamedTuple):
    """What a line such as `/knob math=0.5` does; `run` gets what follows the name."""

    usage: str
    help: str
    run: Callable[[str], None]


class Chat:
    """A conversation, the setting of its knobs, and the commands that change both."""

    def __init__(self, loaded: Loaded, rack: Rack, setting: Setting, terminal: Terminal, args: Namespace) -> None:
        self._loaded, self._rack, self._terminal = loaded, rack, terminal
        self._setting = dict(setting)
        self._system: str = args.system or ""
        self._options: dict[str, Any] = given(args, *CHAT)
        self._longest: int = 128 if args.max_new_tokens is None else args.max_new_tokens
        self._seed: int = args.seed
        self._turns: list[Message] = []
        self._left = False
        self._commands = {
            "/knob": Command("/knob [math=0.5]", "show the knobs, or turn some of them", self._knob),
            "/system": Command("/system [TEXT]", "set the system line, or take it away", self._set_system),
            "/undo": Command("/undo", "forget the last question and its answer", self._undo),
            "/reset": Command("/reset", "forget the conversation; knobs and system line stay", self._reset),
            "/help": Command("/help", "list the commands", self._help),
            "/quit": Command("/quit", "leave", self._quit),
        }

    def rehearse(self) -> None:
        """Answer a word with one token, unheard: what is wrong with the options shows before anybody has typed."""
        from trimtab.generate import generate

        told = [*self._opening(), Message("user", "Hi")]
        generate(
            *self._loaded,
            [told],
            rack=self._rack,
            knobs=self._setting,
            max_new_tokens=min(self._longest, 1),
            seed=self._seed,
            strict=None,
            **self._options,
        )

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False when the user wants to leave."""
        text = line.strip()
        try:
            if text.startswith("/"):
                name, _, rest = text.partition(" ")
                if name not in self._commands:
                    raise unknown_name("command", name, self._commands)
                self._commands[name].run(rest.strip())
            elif text:
                self._answer(unicode_text(text, "The message"))
        except TrimtabError as error:  # a chat goes on
            self._terminal.note(as_options(str(error)))
        return not self._left

    def show_knobs(self) -> None:
        """List the knobs with their strengths."""
        from trimtab.artifact.card import describe_safe_range

        rows: list[list[object]] = []
        for name, knob in self._rack.items():
            strength = f"{self._setting.get(name, 0.0):g}"
            rows.append([name, strength, describe_safe_range(knob), str(getattr(knob, "site", "weights"))])
        self._terminal.note(
            columns(["knob", "strength", "safe range", "site"], rows) if rows else "There are no knobs."
        )

    # Answers

    def _answer(self, text: str) -> None:
        from trimtab.generate import generate

        conversation = [*self._opening(), *self._turns, Message("user", text)]
        room = self._room(conversation)
        pieces: list[str] = []

        def on_text(piece: str) -> None:
            pieces.append(piece)
            self._terminal.stream(piece)

        seed, self._seed = self._seed, self._seed + 1
        try:
            # Every answer is made from the conversation's text: no cache outlives it, so none is of another setting.
            generate(
                *self._loaded,
                [conversation],
                rack=self._rack,
                knobs=self._setting,
                max_new_tokens=room,
                seed=seed,
                strict=None,
                on_text=on_text,
                **self._options,
            )
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self._terminal.note("\n(stopped)")
            if not pieces:
                return
        answer = "".join(pieces)
        self._turns += [Message("user", text), Message("assistant", answer)]
        turns = [{"role": turn.role, "content": turn.content} for turn in conversation]
        self._terminal.stream("\n")
        if self._terminal.json:
            self._terminal.result({"prompt": turns, "text": answer, "knobs": dict(self._setting)}, "")

    def _opening(self) -> list[Message]:
        return [Message("system", self._system)] if self._system else []

    def _room(self, conversation: list[Message]) -> int:
        """Return how many tokens the answer may have before the model's window is full."""
        from trimtab.adapter import Adapter
        from trimtab.render import Renderer

        window = Adapter(self._loaded.model).context_length
        used = len(Renderer(self._loaded.tokenizer).prompt_ids(conversation))
        if window is None or used + self._longest <= window:
            return self._longest
        if used >= window:
            raise OptionError(
                f"The conversation has {used} tokens, and this model reads at most {window}. Shorten it with /undo "
                "or /reset."
            )
        self._terminal.note(f"The model's window of {window} tokens is nearly full: /undo or /reset makes room.")
        return window - used

    # Commands

    def _knob(self, text: str) -> None:
        if not text:
            self.show_knobs()
            return
        changes = parse_setting(text)
        self._rack.resolve(changes)
        self._setting |= changes
        warn_outside(self._rack, changes)
        self._terminal.note(format_setting(self._setting))
        if self._turns:
            self._terminal.note(
                "The conversation so far is read again under the new setting; nothing computed under the old one is "
                "reused."
            )

    def _set_system(self, text: str) -> None:
        self._system = text
        self._terminal.note(f"System line: {text}" if text else "No system line.")

    def _undo(self, _: str) -> None:
        if not self._turns:
            raise OptionError("There is nothing to undo.")
        question = self._turns[-2]
        del self._turns[-2:]
        self._terminal.note(f"Forgotten: {question.content}")

    def _reset(self, _: str) -> None:
        self._turns.clear()
        self._terminal.note("The conversation is forgotten; knobs and system line stay.")

    def _help(self, _: str) -> None:
        rows = [[command.usage, command.help] for command in self._commands.values()]
        self._terminal.note(columns(["command", "what it does"], rows))

    def _quit(self, _: str) -> None:
        self._left = True
