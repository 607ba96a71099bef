"""Knobs on a hub: what a card says whoever wrote the header, and pushing and pulling against a hub of our own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from huggingface_hub import constants
from markdown_it import MarkdownIt

import fake_hub
import pico
from fake_hub import TOKEN, Hub, Repo
from trimtab.artifact import AnyKnob, DeltaKnob, LookaheadKnob, LowRank, load_knob, save_panel
from trimtab.cli import main
from trimtab.errors import HubError, OptionError
from trimtab.evals.curve import curve_of
from trimtab.evals.report import draw_dose_response
from trimtab.exchange.hub import pull, push
from trimtab.exchange.model_card import dose_plot, hub_name, is_generated, is_repository, licence_of, model_card

BASE = {
    "model": "meta-models/Base-8B",
    "revision": "0123456789" * 4,
    "architecture": "llama",
    "paper": "arXiv:2509.23982",
    "options": {"positions": ["last"], "seed": 0},
    "pairs_count": 100,
    "pairs_hash": "ab" * 32,
    "licence": "Apache-2.0",
    "tool": "trimtab 0.1.0",
    "created": "2025-01-02T03:04:05Z",
}
RAILS = ("copying", "facts")


def tuning(rails: tuple[str, ...] = RAILS, *, task: str | None = "math") -> dict[str, Any]:
    rows = [
        {
            "strength": s,
            "alpha": 0.3 * s,
            "score": None if task is None else 0.2 + 0.2 * s,
            "guardrails": dict.fromkeys(rails, 1.0 - 0.01 * abs(s)),
            "broken": 0.01 * abs(s),
            "kl": 0.05 * s * s,
            "within_budget": abs(s) <= 1,
        }
        for s in (-1.0, 0.0, 1.0, 2.0)
    ]
    return {
        "task": task,
        "guardrails": list(rails),
        "budget": 0.02,
        "base": {"broken": 0.0},
        "options": {"broken_budget": 0.05},
        "dose_response": rows,
        "safe_range": [-1.0, 1.0],
    }


def steering(name: str = "math", **changes: Any) -> AnyKnob:
    return replace(pico.knob(name=name), method="palrs", provenance=BASE, **changes)


def delta(**changes: Any) -> AnyKnob:
    parts = {"model.w.weight": LowRank(torch.ones(2, 5), torch.ones(4, 2))}
    return DeltaKnob("help", "preference-vector", parts, provenance=BASE, **changes)


def lookahead(**changes: Any) -> AnyKnob:
    parts = {"model.layers.0.w.weight": torch.ones(4, 4)}
    return LookaheadKnob(
        "risk", "cold-fd", parts, {0: 1.0}, {0: 1.0}, (0,), "model.layers", 0.1, provenance=BASE, **changes
    )


KINDS = {"steering": steering, "delta": delta, "lookahead": lookahead}


def card_of(knob: AnyKnob, **options: Any) -> str:
    return model_card(knob, "ana/math", "math.knob.safetensors", licence=licence_of(knob), **options)


def front_of(card: str) -> dict[str, Any]:
    opening, front, _ = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front)


def rendered(card: str) -> list[Any]:
    """The tokens of the card's body, as a page would show it, HTML allowed."""
    tokens = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").parse(card.split("---\n", 2)[2])
    return [part for token in tokens for part in [token, *(token.children or [])]]


def shape(card: str) -> list[tuple[str, str]]:
    return [(token.type, token.tag) for token in rendered(card)]


# The card


@pytest.mark.parametrize("kind", KINDS)
def test_the_front_matter_of_each_kind_says_what_a_hub_looks_for(kind: str) -> None:
    knob = KINDS[kind]()
    own = {
        "steering": ["activation-steering", "steering-vector", "palrs"],
        "delta": ["weight-difference", "preference-vector"],
        "lookahead": ["activation-steering", "lookahead", "cold-fd"],
    }
    assert front_of(card_of(knob)) == {
        "license": "apache-2.0",
        "base_model": "meta-models/Base-8B",
        "library_name": "trimtab",
        "tags": ["trimtab", *own[kind], "arxiv:2509.23982"],
    }


@pytest.mark.parametrize("tuned", [False, True], ids=["untuned", "tuned"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_holds_the_knobs_own_card_its_provenance_and_how_to_use_it(kind: str, tuned: bool) -> None:
    knob = KINDS[kind](tuning=tuning() if tuned else None)
    card = card_of(knob)
    tokens = rendered(card)
    heads = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    expected = ["Where it comes from", "What it does at which strength", "Use", "Licence"]
    assert heads == [knob.name, *expected]
    text, python, shell = [token.content for token in tokens if token.type == "fence"]
    assert text == knob.card() + "\n"
    assert 'pull("ana/math").knob' in python
    compile(python, "card", "exec")
    command = 'trimtab generate meta-models/Base-8B "..." --knob math.knob.safetensors --strength 1'
    assert shell.splitlines() == ["trimtab pull ana/math", command]
    for known in ("0123456789" * 4, knob.method, "ab" * 32, "`100`", "positions=['last'], seed=0", "Apache-2.0"):
        assert known in card, known
    links = {token.attrs["href"] for token in tokens if token.type == "link_open"}
    assert links == {"https://huggingface.co/meta-models/Base-8B", "https://arxiv.org/abs/2509.23982"}
    assert ("This knob was not tuned" in card) != tuned
    assert ("![score" in card) == tuned
    assert ("Safe range of strengths: **-1 to 1**" in card) == tuned
    assert (dose_plot(knob) is not None) == tuned


def test_the_dose_response_is_a_table_with_a_column_for_each_guardrail() -> None:
    lines = card_of(steering(tuning=tuning())).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| strength"))
    assert lines[at : at + 3] == [
        "| strength | alpha | score | `copying` | `facts` | broken | KL on guardrails | within budget |",
        "|---|---|---|---|---|---|---|---|",
        "| -1 | -0.3 | 0 | 0.99 | 0.99 | 0.01 | 0.05 | yes |",
    ]
    assert lines[at + 5] == "| 2 | 0.6 | 0.6 | 0.98 | 0.98 | 0.02 | 0.2 | no |"


def test_a_card_says_what_was_not_measured() -> None:
    bare = card_of(steering(tuning=tuning((), task=None)))
    assert "No guardrail was watched" in bare
    assert "(no guardrail)" in bare
    assert "the margin of pairs" in bare
    assert (dose_plot(steering(tuning=tuning((), task=None))) or b"")[:4] == b"\x89PNG"
    without = card_of(steering(tuning={"task": "math"}))
    assert "No safe range was measured" in without
    assert "| strength" not in without
    assert "![" not in without


def test_a_model_that_no_hub_knows_is_named_and_not_linked() -> None:
    for model, revision, linked in [
        ("gpt2", None, None),
        ("gpt2", "0" * 40, "gpt2"),
        ("prefworld", "0" * 40, None),
        ("a/b/c", None, None),
        ("../b", None, None),
        (["x"], None, None),
    ]:
        knob = steering().with_(provenance={**BASE, "model": model, "revision": revision})
        assert hub_name(knob) == linked
        assert front_of(card_of(knob)).get("base_model") == linked
    assert 'trimtab.load("prefworld")' in card_of(steering().with_(provenance={**BASE, "model": "prefworld"}))
    assert "`MODEL` is the base model" in card_of(
        steering().with_(provenance={**BASE, "model": "folder", "revision": None})
    )


def test_a_licence_that_hubs_do_not_know_goes_by_its_name() -> None:
    knob = steering().with_(provenance={**BASE, "licence": "My Own: Licence"})
    front = front_of(card_of(knob))
    assert (front["license"], front["license_name"]) == ("other", "my-own-licence")


def test_a_knob_without_a_licence_or_with_two_is_refused() -> None:
    silent = steering().with_(provenance={**BASE, "licence": None})
    assert licence_of(silent, "mit") == "mit"
    assert licence_of(steering(), "apache-2.0") == "Apache-2.0"
    with pytest.raises(OptionError, match="states no licence"):
        licence_of(silent)
    with pytest.raises(OptionError, match="would contradict it"):
        licence_of(steering(), "mit")
    with pytest.raises(OptionError, match="has a name"):
        licence_of(silent, "---")


def test_one_of_several_knobs_is_pulled_by_its_name() -> None:
    card = card_of(steering(), several=True)
    assert 'pull("ana/math", file="math.knob.safetensors")' in card
    assert "trimtab pull ana/math --file math.knob.safetensors" in card


def test_a_card_that_somebody_edited_is_no_longer_ours() -> None:
    card = card_of(steering())
    assert is_generated(card)
    for theirs in (card + "Note: ours is better.\n", card.replace("apache-2.0", "mit"), "# Mine\n", ""):
        assert not is_generated(theirs)


HOSTILE = [
    "x\n---\nlicense: mit\ninjected: yes\n---\n",
    "</code></pre><script>alert(1)</script><!-- ",
    "a | b | c \\| d \\\\| e",
    "x ` `` ```` ` ~~~",
    "![i](http://evil.example/x.png) [l](javascript:alert(1)) <http://evil.example> http://evil.example",
    "# head\n\n```\n\n## more",
    "$x_$ $$y$$ \u202egnp.exe \x1b[2J \ud800",
    "* x " * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_strangers_header_cannot_change_the_shape_of_the_card(kind: str, text: str) -> None:
    name = re.sub(r"[\s,=]", "", "".join(filter(str.isprintable, text)))[:80]

    def made(text: str, name: str, method: str) -> AnyKnob:
        fields = dict.fromkeys([*BASE, "config_hash"], text) | {"options": {text: text}}
        rails = (f"{text}1", f"{text}2")
        measured = tuning(rails, task=text) | {"budget": text}
        measured["dose_response"][0] |= {"score": text, "kl": [text], "within_budget": {text: text}}
        knob = replace(KINDS[kind](), name=name, method=method, provenance=fields, tuning=measured)
        return replace(knob, diagnostics={"warnings": [text]})

    bad, good = made(text, name, "".join(filter(str.isprintable, text))[:80]), made("a.b", "a.b", "a.b")
    card = card_of(bad)
    assert shape(card) == shape(card_of(good))
    assert [token.content for token in rendered(card) if token.type == "html_block"] == [
        re.search("<!-- generated by trimtab.*-->", card)[0] + "\n"  # pyright: ignore[reportOptionalSubscript]
    ]
    front = front_of(card)
    assert set(front) == {"license", "license_name", "library_name", "tags"}
    assert all(re.fullmatch(r"[a-z0-9.-]+", value) for value in [front["license_name"], *front["tags"]])
    assert is_generated(card)
    assert len(card) < 20_000
    if kind == "steering":  # a plot knows no kinds
        assert dose_plot(bad)


def test_a_dose_response_of_any_content_is_drawn_or_left_out() -> None:
    rows: list[Any] = [
        {"strength": 10**300},
        {"strength": "x"},
        7,
        {"strength": 1.0, "guardrails": 3, "kl": 1e308, "broken": None},
        {"strength": 0},
    ]
    odd = {"dose_response": rows, "guardrails": [*"abcdefghijklmnopqrst", "_hidden", 3], "safe_range": [-1e300, 1e300]}
    knob = steering(tuning=odd)
    assert (dose_plot(knob) or b"")[:4] == b"\x89PNG"
    curve = curve_of(odd)
    assert curve is not None
    low, high = draw_dose_response(curve, "a", odd["safe_range"]).axes[0].get_xlim()
    assert -1 < low < high < 2  # as far as was measured
    assert len(next(line for line in card_of(knob).splitlines() if line.startswith("| strength")).split("|")) == 20
    for none in (rows[:3], rows[-1:], {}, None):
        assert dose_plot(steering(tuning={"dose_response": none})) is None


@pytest.mark.parametrize(
    "name",
    ["math", "/math", "ana/", "a/b/c", "ana/..", "ana/a--b", "ana/a..b", "ana/m.git", "ana/m\n", "-a/b", "ana/é", ""],
)
def test_a_name_that_no_repository_has_is_refused_before_anything_is_sent(name: str, tmp_path: Path) -> None:
    assert not is_repository(name)
    with pytest.raises(OptionError, match="OWNER/NAME"):
        pull(name)
    with pytest.raises(OptionError, match="OWNER/NAME"):
        push(tmp_path / "none.safetensors", name)


# What is pushed, without a hub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a tuned knob and one that states no licence."""
    monkeypatch.chdir(tmp_path)
    steering(tuning=tuning()).save("math.knob.safetensors")
    steering("bare").with_(provenance={}).save("bare.safetensors")
    return tmp_path


def test_a_dry_run_writes_exactly_what_would_be_pushed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "math.knob.safetensors", "ana/math", "--dry-run", "new/dry", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    files = ["math.knob.safetensors", "README.md", "dose_response.png"]
    assert record == {"url": "https://huggingface.co/ana/math", "commit": None, "files": files, "dry_run": "new/dry"}
    assert sorted(path.name for path in (folder / "new/dry").iterdir()) == sorted(files)
    assert (folder / "new/dry" / files[0]).read_bytes() == (folder / files[0]).read_bytes()
    assert (folder / "new/dry/README.md").read_text(encoding="utf-8") == card_of(load_knob(files[0]))
    done = push(
        "bare.safetensors",
        "ana/bare",
        licence="mit",
        private=True,
        message="m",
        revision="a/b",
        replace_card=True,
        dry_run="second",
    )
    assert done == ("https://huggingface.co/ana/bare/tree/a%2Fb", None, ("bare.safetensors", "README.md"))
    (folder / "second" / "README.md").write_text("mine")
    with pytest.raises(OptionError, match="nothing in it is replaced"):
        push("bare.safetensors", "ana/bare", licence="mit", dry_run="second")
    assert (folder / "second" / "README.md").read_text() == "mine"
    with pytest.raises(OptionError, match="nothing in it is replaced"):
        push("bare.safetensors", "ana/bare", licence="mit", dry_run="bare.safetensors")


def test_what_cannot_be_pushed_is_said_before_anything_is_sent(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    save_panel("panel.json", {"math": ("math.knob.safetensors", 1.0)})
    Path("-x.safetensors").write_bytes(Path("bare.safetensors").read_bytes())
    Path("a.knob").write_bytes(Path("bare.safetensors").read_bytes())
    Path("no.safetensors").write_bytes(b"\x80\x04pickle")
    for words, told in [
        (["bare.safetensors", "ana/x"], "Pass --licence apache-2.0"),
        (["panel.json", "ana/x"], "one by one"),
        (["no.safetensors", "ana/x"], "Cannot load a knob"),
        (["./-x.safetensors", "ana/x", "--licence", "mit"], "Rename the file"),
        (["a.knob", "ana/x", "--licence", "mit"], "Rename the file"),
        (["math.knob.safetensors", "ana/x", "--message", " "], "message of the commit is empty"),
        (["math.knob.safetensors", "ana/x", "--revision", ""], "A revision is"),
        (["none.safetensors", "ana/x"], "There is no file"),
    ]:
        assert main(["push", *words]) == 2
        said = capsys.readouterr()
        assert told in said.err, said.err
        assert said.out == ""


def test_offline_and_without_a_connection_the_reason_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        pull("ana/math", file="math.knob.safetensors", revision="main", out="x.safetensors")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push("math.knob.safetensors", "ana/math")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:secret@127.0.0.1:1")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:1 cannot be reached") as error:
        pull("ana/math")
    assert "secret" not in str(error.value)


# Against a hub


class Said(NamedTuple):
    status: int
    out: str
    err: str


PROGRAM = """
import contextlib, io, json, os, sys
from trimtab.cli import main
from trimtab.exchange.hub import pull
for job in json.load(sys.stdin):
    os.environ.update(job.get("env", {}))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if "pull" in job:
            done = pull(**job["pull"])
            status = 0
            print(json.dumps([done.knob.name, str(done.path), done.file, done.commit]))
        else:
            status = main(job["words"])
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def run(hub: Hub, folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, Said]:
    """Run commands one after the other in one fresh process, which reads the hub's address when it starts."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    listed = [{"env": {"HF_TOKEN": TOKEN}, **job} for job in jobs.values()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(listed),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [Said(*json.loads(line)) for line in done.stdout.splitlines()]
    assert TOKEN not in done.stdout + done.stderr
    return dict(zip(jobs, said, strict=True))


def words(text: str, **env: str) -> dict[str, Any]:
    return {"words": text.split(), **({"env": env} if env else {})}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with fake_hub.serve() as there:
        yield there


def test_a_pushed_knob_comes_back_as_it_was(hub: Hub, folder: Path) -> None:
    delta().save("help.safetensors")
    lookahead().save("risk.safetensors")
    hub.regular = {"ana/help"}
    said = run(
        hub,
        folder,
        {
            "push": words("push math.knob.safetensors ana/math --private --json"),
            "pull": words("pull ana/math --out back/new.safetensors"),
            "again": words("push risk.safetensors ana/math --message Another"),
            "several": words("pull ana/math"),
            "named": words("pull ana/math --file risk.safetensors --out risk.back.safetensors --json"),
            "branch": words("push math.knob.safetensors ana/math --revision v/2"),
            "regular": words("push help.safetensors ana/help"),
            "own name": words("pull ana/help --out help.back.safetensors"),
            "cached": {"pull": {"repo": "ana/math", "file": "math.knob.safetensors", "revision": "v/2"}},
        },
    )
    assert {name: one.status for name, one in said.items() if one.status} == {"several": 2}
    assert all(not one.err for name, one in said.items() if name != "several")
    knob = (folder / "math.knob.safetensors").read_bytes()
    repo = hub.repos["ana/math"]
    assert repo.private
    assert not hub.repos["ana/help"].private
    (_, first), (message, files), (another, last) = repo.branches["main"]
    assert set(files) - set(first) == {"math.knob.safetensors", "README.md", "dose_response.png"}
    assert files["math.knob.safetensors"] == knob
    assert files["README.md"].decode() == card_of(load_knob(folder / "math.knob.safetensors"))
    assert files["dose_response.png"][:4] == b"\x89PNG"
    assert (message, another) == ("Push the knob math", "Another")
    assert set(last) - set(files) == {"risk.safetensors"}
    assert "--file risk.safetensors" in last["README.md"].decode()
    assert [visit["header"].get("parentCommit") is not None for visit in hub.visits] == [False, True, True, False]
    assert [visit["keys"] for visit in hub.visits] == [{"file", "lfsFile"}] * 3 + [{"file"}]
    assert [len(commits) for commits in repo.branches.values()] == [3, 4]
    pushed = json.loads(said["push"].out)
    assert pushed["url"] == f"{hub.url}/ana/math"
    assert re.fullmatch("[0-9a-f]{40}", pushed["commit"])
    assert f"{hub.url}/ana/math/tree/v%2F2" in said["branch"].out
    assert (folder / "back/new.safetensors").read_bytes() == knob
    for line in ("math (steering, palrs)", "meta-models/Base-8B", "-1 to 1", "Apache-2.0", pushed["commit"]):
        assert line in said["pull"].out
    assert "trimtab generate meta-models/Base-8B" in said["pull"].out.splitlines()[-1]
    assert "several files that may be knobs: math.knob.safetensors, risk.safetensors" in said["several"].err
    assert "--file math.knob.safetensors" in said["several"].err
    assert json.loads(said["named"].out)["commit"] == repo.sha("main")
    assert (folder / "risk.back.safetensors").read_bytes() == (folder / "risk.safetensors").read_bytes()
    assert (folder / "help.back.safetensors").read_bytes() == (folder / "help.safetensors").read_bytes()
    name, path, file, commit = json.loads(said["cached"].out)
    assert (name, file, commit) == ("math", "math.knob.safetensors", repo.sha("v/2"))
    assert Path(path).is_relative_to(folder / "home")


HOSTILE_NAMES = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/../../x.safetensors",
    "a//x.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "-x.safetensors",
    ".x.safetensors",
    "~/x.safetensors",
    "x\x1b[2J.safetensors",
    "x\n.safetensors",
    "$(x).safetensors",
    "x\u202e.safetensors",
    "x" * 300 + ".safetensors",
    "x.bin",
    "x.pkl",
    "code.py",
]


def test_what_a_hub_refuses_and_what_strangers_put_there_is_said_in_words(hub: Hub, folder: Path) -> None:
    data = (folder / "math.knob.safetensors").read_bytes()

    def there(name: str, files: dict[str, bytes], **options: Any) -> Repo:
        hub.repos[f"bo/{name}"] = repo = Repo(**options)
        if files:
            repo.commit("first", files)
        return repo

    there("hidden", {"x.safetensors": data}, private=True)
    there("gated", {"x.safetensors": data}, gated=True)
    there("public", {})
    there("mine", {"README.md": b"# Mine\n"})
    there("odd", dict.fromkeys(HOSTILE_NAMES, data))
    there("among", dict.fromkeys([*HOSTILE_NAMES, "of/good.safetensors"], data))
    there("pickle", {"x.safetensors": b"\x80\x04csystem\n"})
    there(
        "plain",
        {
            "x.safetensors": len(b := b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}').to_bytes(8, "little")
            + b
        },
    )
    there("torn", {"x.safetensors": data[:-1] + bytes([data[-1] ^ 1])})
    there("mess", {"x.safetensors": data})
    there("moved", {})
    there("forbidden", {})
    there("broken", {})
    hub.refuse = {
        "POST /api/models/bo/moved/commit": (412, "", f"moved {TOKEN} \x1b[2J"),
        "POST /api/models/bo/forbidden/preupload": (403, "", "no"),
        "GET /api/models/bo/broken": (500, "", "sorry"),
        "POST /api/repos/create": (403, "", "not yours"),
    }
    (folder / "notes.safetensors").write_text("mine")
    (folder / "x.safetensors").write_text("mine")
    knob = "push math.knob.safetensors"
    expected = {
        f"{knob} bo/none": "You may not do that to bo/none (403). It says: not yours",
        f"{knob} bo/public --private": "exists and is public",
        f"{knob} bo/mine": "--replace-card",
        f"{knob} bo/moved": "was changed meanwhile (412). It says: moved ***",
        f"{knob} bo/forbidden": "Use a token that may write there",
        f"{knob} bo/broken": "The hub refused (500). It says: sorry",
        "pull bo/none": "There is no model repository bo/none that you may see",
        "pull bo/gated --out p.safetensors": "bo/gated is gated. Ask for access",
        "pull bo/mine --revision v9": "bo/mine has no revision 'v9'",
        "pull bo/mine": "bo/mine has no knob",
        "pull bo/odd": "their names are not taken from strangers",
        "pull bo/odd --file ../x.safetensors": "No knob is pulled from a file of that name",
        "pull bo/odd --file x.pkl": "No knob is pulled from a file of that name",
        "pull bo/among --file y.safetensors": "It has of/good.safetensors",
        "pull bo/mess": "exists and is not known to be a knob",
        "pull bo/pickle --out p.safetensors": "x.safetensors of bo/pickle at commit",
        "pull bo/plain --out p.safetensors": "does not begin as one does",
        "pull bo/torn --out p.safetensors": "the checksum differs",
        "pull bo/among --out notes.safetensors": "exists and is no knob",
    }
    jobs = {text: words(text) for text in expected}
    stranger = {"HF_TOKEN": "hf_wrong"}
    jobs |= {
        "no login": words(f"{knob} bo/x", HF_TOKEN=""),
        "no login, hidden": words("pull bo/hidden", HF_TOKEN=""),
        "wrong token": {**words("pull bo/public"), "env": stranger},
        "good": words("pull bo/among"),
        "replaced": words(f"{knob} bo/mine --replace-card"),
    }
    before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
    commits = {name: len(repo.branches["main"]) for name, repo in hub.repos.items()}
    said = run(hub, folder, jobs)
    expected |= {
        "no login": "There is no token for the hub. Run `hf auth login`",
        "no login, hidden": "There is no model repository bo/hidden that you may see",
        "wrong token": "The hub does not accept the token (401)",
    }
    for text, told in expected.items():
        assert said[text].status == 2, text
        assert told in said[text].err, said[text].err
        assert said[text].out == ""
        assert "Traceback" not in said[text].err
        assert len(said[text].err.splitlines()) == 1
        assert "\x1b" not in said[text].err
        assert "hf_wrong" not in said[text].err
    assert said["good"].status == said["replaced"].status == 0, said
    assert (folder / "good.safetensors").read_bytes() == data
    assert (folder / "notes.safetensors").read_text() == (folder / "x.safetensors").read_text() == "mine"
    assert not (folder / "p.safetensors").exists()
    changed = {name for name, repo in hub.repos.items() if len(repo.branches["main"]) != commits[name]}
    assert changed == {"bo/mine"}
    assert set(hub.repos) == set(before)
    assert is_generated(hub.repos["bo/mine"].branches["main"][-1][1]["README.md"].decode())
    fetched = [line for line in hub.requests if "/resolve/" in line and line.startswith("GET /bo/")]
    assert all(line.endswith((".safetensors", "README.md")) for line in fetched)
    assert not any("/bo/odd/resolve/" in line for line in hub.requests)


def test_a_hub_that_speaks_something_else_is_said_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with fake_hub.serve() as there:
        monkeypatch.setattr(constants, "ENDPOINT", there.url)
        for answer in (b"<html>hello</html>", b"[]", b"{}", b'{"id": "a/b", "siblings": [{}]}'):
            there.page = answer
            with pytest.raises(HubError, match="does not answer as the hub does"):
                pull("ana/math")
        there.page = b'{"id": "a/b", "sha": "../../x", "siblings": [{"rfilename": "x.safetensors"}]}'
        with pytest.raises(HubError, match="has no commit yet"):
            pull("ana/math")
