"""What users have instead of good pairs: each mistake is one error that says where, what was got, what would work."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import pico
from trimtab import formats
from trimtab.artifact import Rack
from trimtab.check import check
from trimtab.cli import main
from trimtab.errors import MissingDependency, PairsError, TrimtabError, TrimtabWarning
from trimtab.generate import generate
from trimtab.learn import learn
from trimtab.pairs import Pairs
from trimtab.render import load
from trimtab.runtime import steer
from trimtab.train.steps import learn_step
from trimtab.train.vectors import learn_weights
from trimtab.tune import tune
from trimtab.types import Message, Pair, parse_setting

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
PAIR = Pair((Message("user", "Why?"),), "Because.", "No.")


WRONG_TYPES: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "check a name": (lambda lm, words: check("prefworld"), "check.. takes a loaded model, .*got 'prefworld'"),
    "steer nothing": (lambda lm, words: steer(None, {}).__enter__(), "A model is a torch module, .*got None"),
    "generate with a name": (lambda lm, words: generate("x", words, ["a"]), "A model is a torch module"),
    "generate without a tokenizer": (lambda lm, words: generate(lm, None, ["a"]), "A tokenizer is one of transf.*None"),
    "learn without a tokenizer": (lambda lm, words: learn(lm, None, Pairs([PAIR])), "A tokenizer is one of"),
    "a rack of numbers": (lambda lm, words: Rack(a=3), "A rack holds knobs, or paths of knob files; 'a' is 3"),
    "one marker of thoughts": (lambda lm, words: generate(lm, words, ["a"], thinking=("<a>",)), "are two texts"),
    "a number for markers": (lambda lm, words: generate(lm, words, ["a"], thinking=3), "are two texts, .*got 3"),
    "no text for a marker": (lambda lm, words: generate(lm, words, ["a"], thinking=("<a>", None)), "are two texts"),
    "a list of knobs to steer with": (lambda lm, words: steer(lm, [pico.knob()]).__enter__(), "Settings map knobs to"),
    "a list of knobs": (lambda lm, words: generate(lm, words, ["a"], knobs=[pico.knob()]), "A setting is written"),
    "no setting": (lambda lm, words: generate(lm, words, ["a"], knobs=[None]), "A setting is written .*got None"),
    "a number for a name": (lambda lm, words: generate(lm, words, ["a"], knobs={5: 1}), "set by their names.*got 5"),
    "a temperature that is text": (lambda lm, words: generate(lm, words, ["a"], temperature="1"), "got '1'"),
    "arguments of tune in another order": (
        lambda lm, words: tune(lm, words, pico.knob(), Pairs([PAIR])),
        "wants a Knob where it got LlamaForCausalLM",
    ),
    "a task by its name": (
        lambda lm, words: tune(pico.knob(), lm, words, Pairs([PAIR]), task="prefworld:math"),
        "wants a Task where it got str",
    ),
    "another model's tokenizer": (
        lambda lm, words: learn(pico.model(vocab_size=50), words, Pairs([PAIR])),
        "beyond the 50 embeddings of this LlamaForCausalLM: its tokens come from the tokenizer of another model",
    ),
    "another model's tokenizer for text": (
        lambda lm, words: generate(pico.model(vocab_size=50), words, ["a"]),
        "beyond the 50 embeddings",
    ),
    "no values": (lambda lm, words: load("prefworld", device="meta"), "Cannot use device='meta': tensors there"),
    "a checkpoint without a name": (
        lambda lm, words: learn(lm, words, Pairs([PAIR]), checkpoint=""),
        "folder is empty",
    ),
    "a checkpoint by number": (
        lambda lm, words: learn(lm, words, Pairs([PAIR]), checkpoint=3),
        "is the path of a folder, or None; got 3",
    ),
    "a layer that is true": (lambda lm, words: learn(lm, words, Pairs([PAIR]), layers=[True]), "got True"),
    "a name by number": (lambda lm, words: learn(lm, words, Pairs([PAIR]), name=3), "1 to 100 printable.*got 3"),
    "a name that no setting could spell, before training": (
        lambda lm, words: learn_weights(lm, words, Pairs([PAIR]), name="a b"),
        "1 to 100 printable.*got 'a b'",
    ),
    "the same before a gradient": (lambda lm, words: learn_step(lm, words, Pairs([PAIR]), name="a b"), "got 'a b'"),
    "several methods": (lambda lm, words: learn(lm, words, Pairs([PAIR]), method=["palrs"]), "Unknown method"),
    "no pairs at all": (lambda lm, words: Pairs(None), "are made of several Pair; got null"),
    "a licence by number": (lambda lm, words: learn(lm, words, Pairs([PAIR]), licence=3), "is text, .*got 3"),
    "one guardrail": (
        lambda lm, words: tune(pico.knob(), lm, words, Pairs([PAIR]), guardrails=3),
        r"several tasks, as in \[task\], .*got 3",
    ),
    "guardrails that can be gone through once": (
        lambda lm, words: tune(pico.knob(), lm, words, Pairs([PAIR]), guardrails=(task for task in ())),
        r"several tasks, as in \[task\]",
    ),
    "a word for yes": (
        lambda lm, words: tune(pico.knob(), lm, words, Pairs([PAIR]), dose_response="no"),
        "is True or False; got 'no'",
    ),
    "digits of another alphabet": (lambda lm, words: parse_setting("s=\u0663"), "must be a number"),
    "Python's spelling": (lambda lm, words: parse_setting("s=1_0"), "must be a number; got '1_0'"),
    "a device that is none": (lambda lm, words: load("prefworld", device="gpuu"), "Cannot use device='gpuu': "),
    "a device that is a number": (lambda lm, words: load("prefworld", device=3.5), "Cannot use device=3.5"),
    "a seed that is none": (lambda lm, words: learn(lm, words, Pairs([PAIR]), seed=2**64), r"from 0 to 2\*\*63 - 1"),
    "a seed that is text": (lambda lm, words: generate(lm, words, ["a"], seed="1"), "got '1'"),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_what_is_not_of_the_right_kind_is_said_in_one_line(case: str) -> None:
    call, message = WRONG_TYPES[case]
    with pytest.raises(TrimtabError, match=message) as caught:
        call(pico.model(), pico.tokenizer())
    assert "\n" not in str(caught.value)


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(*rows: list[object], delimiter: str = ",") -> str:
    """Rows as the csv module writes them; a list becomes a JSON cell."""
    text = io.StringIO(newline="")
    cells = [[json.dumps(cell) if isinstance(cell, list) else cell for cell in row] for row in rows]
    csv.writer(text, delimiter=delimiter).writerows(cells)
    return text.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file of the given name and return its path."""

    def call(name: str, data: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return call


Write = Callable[[str, "str | bytes"], Path]


def complaint(path: Path, **options: Any) -> str:
    """What loading says about a file, which is one line of bounded length."""
    with pytest.raises(PairsError) as caught:
        Pairs.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) - len(str(path)) < 300
    return message


# Formats


ASK, GOOD_TURN, BAD_TURN = said("user", "Why?"), said("assistant", "Because."), said("assistant", "No.")


@pytest.mark.quick
@pytest.mark.parametrize("delimiter", [",", "\t"], ids=["csv", "tsv"])
def test_tables_are_read_with_messages_texts_over_several_lines_and_other_columns_as_meta(
    write: Write, delimiter: str
) -> None:
    system = said("system", "Be brief.")
    rows: list[list[object]] = [
        ["prompt", " chosen", "rejected", "id"],
        ["Why?", "Because.", "No.", "x"],
        [[system, ASK], [GOOD_TURN], [BAD_TURN], ""],
        ["", [ASK, GOOD_TURN], [ASK, said("assistant", "[1, 2]")], "2"],
        ["Two\nlines?", 'Yes, "two"\r\nof them\t.', '[{"a": 1}]', "3"],
        ["", "", "", ""],
    ]
    name = "pairs.csv" if delimiter == "," else "PAIRS.TSV"
    pairs = Pairs.load(write(name, "\ufeff" + table(*rows, delimiter=delimiter)))
    assert [dict(pair.meta) for pair in pairs] == [{"id": "x"}, {"id": ""}, {"id": "2"}, {"id": "3"}]
    assert pairs[0] == Pair(PAIR.prompt, PAIR.chosen, PAIR.rejected, {"id": "x"})
    assert pairs[1].prompt == (Message("system", "Be brief."), Message("user", "Why?"))
    assert (pairs[2].prompt, pairs[2].rejected) == (PAIR.prompt, "[1, 2]")
    assert pairs[3].prompt[0].content == "Two\nlines?"
    assert pairs[3].chosen == 'Yes, "two"\r\nof them\t.'
    assert pairs[3].rejected == '[{"a": 1}]'  # a list, but of no messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,rejected\na,b\n", "Line 2 has 2 cells; the header has 3"),
        ('prompt,chosen,rejected\n"a\na",b,c\na,b,c,d\n', "Line 4 has 4 cells"),
        ("prompt,chosen,rejected\na,b,c\nd,b,\n", "Line 3: the rejected answer is empty"),
        ("prompt,chosen,rejected\n,b,c\n", "Line 2 has no prompt"),
        ("prompt;chosen;rejected\na;b;c\n", "Line 1 has one column, 'prompt;chosen;rejected'; columns are"),
        ("prompt,chosen,chosen\na,b,c\n", "Line 1 has two columns 'chosen'"),
        ("question,chosen,rejected\na,b,c\n", "Rename 'question' to 'prompt'."),
        ('prompt,chosen,rejected\na,"b" c,d\n', "Line 2 cannot be read as cells separated by commas: ',' expected"),
        ('prompt,chosen,rejected\na,b,c\nd,"e\nf,g\n', "Line 3 cannot be read"),
        (f"prompt,chosen,rejected\na,b,{'c' * 140_000}\n", "field larger than field limit (131072). Use .jsonl"),
        ("prompt,chosen,rejected\n", "There are no pairs"),
        ("", "There are no pairs"),
        ("prompt,chosen,rejected\na,\"[{'role': 'user', 'content': 'b'}]\",c\n", "Line 2, chosen is not JSON: "),
        ("prompt,chosen,rejected\na,\"[{'role': 'user', 'content': 'b'}]\",c\n", "by json.dumps, and not by str"),
        ('prompt,chosen,rejected\na,"[{""role"": ""b"", ""role"": 1}]",c\n', "has two fields 'role' in one object"),
        ('prompt,chosen,rejected\n"[{""from"": ""human"", ""value"": ""a""}]",b,c\n', "has 'from' and 'value'"),
    ],
)  # fmt: skip
@pytest.mark.quick
def test_a_bad_table_is_an_error_that_names_its_line(write: Write, text: str, message: str) -> None:
    assert message in complaint(write("pairs.csv", text))


def write_parquet(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.quick
def test_parquet_is_read_with_lists_of_structs_and_nulls(tmp_path: Path) -> None:
    # Arrow gives every struct the fields of all, so a message has nulls where it had nothing.
    path = write_parquet(
        tmp_path / "year=2024.parquet",
        prompt=[None, [said("system", "Be brief."), ASK]],
        chosen=[[ASK, GOOD_TURN], [said("assistant", "Because.", name=None)]],
        rejected=[[ASK, BAD_TURN], [BAD_TURN]],
        score=[0.5, None],
    )
    pairs = Pairs.load(path)
    assert pairs[0] == Pair(PAIR.prompt, "Because.", "No.", {"score": 0.5})
    assert pairs[1].prompt == (Message("system", "Be brief."), Message("user", "Why?"))
    assert pairs[1].meta == {"score": None}
    plain = write_parquet(tmp_path / "plain.parquet", prompt=["Why?"], chosen=["Because."], rejected=["No."])
    assert Pairs.load(plain)[0] == PAIR


@pytest.mark.quick
def test_a_bad_parquet_file_is_an_error_that_names_its_row(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, prompt=["a", "b"], chosen=["c", None], rejected=["d", "e"])
    assert "Row 2: chosen is null" in complaint(path)
    write_parquet(path, prompt=[1], chosen=["c"], rejected=["d"])
    assert "Row 1, prompt is a number" in complaint(path)
    write_parquet(path, prompt=["a"], chosen=[b"c"], rejected=["d"])
    assert "Row 1, chosen is bytes" in complaint(path)
    parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "chosen", "chosen"]), path)
    assert str(path) in complaint(path)
    write_parquet(path, prompt=[], chosen=[], rejected=[])
    assert "There are no pairs" in complaint(path)
    assert "cannot be read as Parquet" in complaint(write("b.parquet", jsonl(GOOD)))


@pytest.mark.quick
def test_parquet_without_pyarrow_prints_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", prompt=["a"], chosen=["b"], rejected=["c"])
    monkeypatch.setattr(formats, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match="Install it with: pip install pyarrow"):
        Pairs.load(path)


@pytest.mark.quick
def test_a_file_packed_by_gzip_is_unpacked_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl(GOOD).encode() * 50)
    path.write_bytes(whole)
    assert len(Pairs.load(path, duplicates="drop")) == 1
    for data, words in (
        (whole[:-20], "Cannot unpack"),
        (b"{}", "Not a gzipped file"),
        (whole[:12] + b"\xff\xff" + whole[14:], "Cannot unpack"),
        (gzip.compress(b"{"), "Line 1 is not JSON"),
    ):
        path.write_bytes(data)
        assert words in complaint(path)


@pytest.mark.quick
def test_the_suffix_says_how_a_file_is_read_and_another_one_is_refused(write: Write, tmp_path: Path) -> None:
    assert len(Pairs.load(write("a.ndjson", jsonl(GOOD)))) == len(Pairs.load(write("b.JSONL", jsonl(GOOD)))) == 1
    known = "Known: .csv, .json, .jsonl, .ndjson, .parquet, .tsv."
    for name, got in (("a.txt", "the suffix '.txt'"), ("pairs", "no suffix"), ("a.txt.gz", "the suffix '.txt'")):
        assert f"it has {got}. {known}" in complaint(write(name, jsonl(GOOD)))
    for name in ("a.csv", "a.parquet", "a.txt", "a"):
        with pytest.raises(PairsError, match=r"saved to a \.jsonl or a \.json file"):
            Pairs([PAIR]).save(tmp_path / "out" / name)


# Bytes


@pytest.mark.quick
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_bytes_that_are_not_utf_8_are_named_by_line_and_byte(write: Write, suffix: str) -> None:
    text = "{}\n\ufeff[caf\u00e9]\n".encode().replace("\u00e9".encode(), b"\xe9")
    assert "Line 2 is not UTF-8: byte 8 of the line is 0xe9." in complaint(write(f"a.{suffix}", text))
    assert "zero bytes, as binary files and UTF-16 do" in complaint(write(f"b.{suffix}", jsonl(GOOD).encode("utf-16")))
    assert "Line 1 is not UTF-8: byte 2 " in complaint(write(f"c.{suffix}", b"\x1f\x8b\x08\x01"))


@pytest.mark.quick
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "txt", ""])
def test_a_folder_and_a_missing_file_are_said_to_be_that(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    assert f"Cannot read {str(path)!r}: No such file" in complaint(path)
    path.mkdir()
    assert f"Cannot read {str(path)!r}: Is a directory." in complaint(path)


@pytest.mark.quick
def test_byte_order_mark_and_windows_line_ends_are_no_part_of_the_pairs(write: Write) -> None:
    bom = b"\xef\xbb\xbf"
    assert Pairs.load(write("a.jsonl", bom + jsonl(GOOD).replace("\n", "\r\n").encode()))[0] == PAIR
    assert Pairs.load(write("a.json", bom + b"[\r\n" + json.dumps(GOOD).encode() + b"\r\n]\r\n"))[0] == PAIR
    rows: list[list[object]] = [list(GOOD), list(GOOD.values())]
    assert Pairs.load(write("a.csv", bom + table(*rows).encode()))[0] == PAIR
    assert Pairs.load(write("b.csv", table(*rows).replace("\r\n", "\r")))[0] == PAIR
    assert Pairs.load(write("c.csv", table(*rows).replace("\r\n", "\n")))[0] == PAIR


def test_a_line_of_ten_megabytes_is_read_and_never_repeated_in_an_error(write: Write) -> None:
    long = "word " * 2_000_000
    (pair,) = Pairs.load(write("a.jsonl", jsonl({**GOOD, "chosen": long})))
    assert pair.chosen == long
    bad = [
        jsonl({**GOOD, "chosen": long})[:-3],
        jsonl({**GOOD, "chosen": [long]}),
        jsonl({long: 1}),
        jsonl({**GOOD, "chosen": long, "rejected": long}),
        jsonl({"prompt": [said(long, "a")], "chosen": "b", "rejected": "c"}),
        jsonl(GOOD).replace("Because", long)[:-2] + f', "{long}": 1, "{long}": 1}}',
    ]
    for text in bad:
        assert "ine 1" in complaint(write("b.jsonl", text))


# JSON


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "Line 2 is not JSON: Expecting ',' delimiter at column 15."),
        (json.dumps(GOOD) * 2, "Line 2 is not JSON: Extra data at column "),
        ("{'prompt': 'a'}", "Line 2 is not JSON: Expecting property name enclosed in double quotes at column 2."),
        ('{"prompt": "a\tb"}', "Line 2 is not JSON: Invalid control character"),
        (jsonl({**GOOD, "score": float("nan")}), "Line 2 cannot be read: NaN is not a finite number; JSON has null"),
        (jsonl({**GOOD, "score": -float("inf")}), "Line 2 cannot be read: -Infinity is not a finite number"),
        (
            json.dumps(GOOD)[:-1] + ', "chosen": "x"}',
            "Line 2 cannot be read: it has two fields 'chosen' in one object.",
        ),
        ('{"a": [{"b": {"c": 1, "c": 1}}]}', "Line 2 cannot be read: it has two fields 'c' in one object."),
        ('{"a":' * 100_000, "Line 2 cannot be read: it is nested too deeply"),
        (json.dumps({**GOOD, "x": 0})[:-2] + "9" * 5000 + "}", "Line 2 cannot be read: Exceeds the limit"),
        ("3", "Line 2 is a number; a record is an object with prompt, chosen and rejected."),
        ("true", "Line 2 is true or false; a record"),
        ("null", "Line 2 is null; a record"),
    ],
    ids=range(13),
)
def test_a_line_that_is_not_plain_json_is_named(write: Write, line: str, message: str) -> None:
    assert message in complaint(write("a.jsonl", jsonl({**GOOD, "prompt": "other"}) + line))


@pytest.mark.quick
def test_a_list_named_jsonl_and_lines_named_json_are_told_apart(write: Write) -> None:
    listed = json.dumps([GOOD], indent=1)
    assert "Line 1 starts a list; a file that holds one list of records is named .json." in complaint(
        write("a.jsonl", listed)
    )
    assert "with one record per line is named .jsonl" in complaint(write("a.json", jsonl(GOOD, GOOD)))
    assert "not JSON: Expecting ',' delimiter at line 3, column 3." in complaint(write("b.json", '[\n{"a": 1}\n  {}]'))
    assert "Item 2 has no rejected" in complaint(write("c.json", json.dumps([GOOD, {"prompt": "a", "chosen": "b"}])))
    assert "There are no pairs" in complaint(write("d.json", ""))
    assert "There are no pairs" in complaint(write("e.json", "[]"))
    assert "The file holds an object" in complaint(write("f.json", json.dumps({"data": [GOOD]})))


# Records


def refusal(record: object) -> str:
    with pytest.raises(PairsError) as caught:
        Pairs.from_records([record])  # type: ignore[list-item]
    return str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": "b"}, "no chosen and no rejected; it has question, answer. Rename 'question' to"),
        ({"question": "a", "response_j": "b", "response_k": "c"}, "'response_j' to 'chosen' and 'response_k' to 'rej"),
        ({"prompt": "a", "accepted": "b", "rejected": "c"}, "no chosen; it has prompt, accepted, rejected. Rename 'ac"),
        ({"prompt": "a", "win": "b", "lose": "c"}, "Rename 'win' to 'chosen' and 'lose' to 'rejected'."),
        ({"Prompt": "a", "Chosen": "b", "Rejected": "c"}, "Rename 'Prompt' to 'prompt' and 'Chosen' to 'chosen' and"),
        ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "Rename 'rejectd' to 'rejected'."),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "Record 1 has no prompt, and its answers do not hold"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "Rename 'instruction' to 'prompt'."),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "like transcripts"),
        ({}, "no chosen and no rejected; it has nothing."),
        ({str(n): n for n in range(999)}, "it has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ..."),
        ({**GOOD, "prompt": []}, "must end with a user turn; it ends with nothing"),
        ({**GOOD, "prompt": ASK}, "Record 1, prompt is an object; it must be text or a list of messages."),
        ({**GOOD, "chosen": []}, "Record 1, chosen: the last message must be the assistant's; the list is empty."),
        ({**GOOD, "chosen": [ASK]}, "the last message must be the assistant's; it is of role 'user'."),
        ({**GOOD, "prompt": [said("system", "a")]}, "must end with a user turn; it ends with system"),
        ({**GOOD, "prompt": [said("tool", "a"), ASK]}, "role 'tool' is not one of system, user, assistant. Trimtab"),
        ({**GOOD, "chosen": [said("function", "a")]}, "leave this one out."),
        ({**GOOD, "prompt": [said("human", "a")]}, "Rename it to 'user'."),
        ({**GOOD, "prompt": [said("User", "a")]}, "Rename it to 'user'."),
        ({**GOOD, "prompt": [{"from": "human", "value": "a"}]}, "message 1 has 'from' and 'value'. Rename them to"),
        ({**GOOD, "chosen": [said("assistant", None, tool_calls=[{"id": 1}])]}, "message 1 has 'tool_calls' besides"),
        ({**GOOD, "prompt": [said("user", "a", name="Tom")]}, "message 1 has 'name' besides role and content"),
        ({**GOOD, "chosen": [said("assistant", None)]}, "Record 1, chosen: a message is {\"role\": text"),
        ({**GOOD, "prompt": ["a"]}, "Record 1, prompt: a message is {\"role\": text, \"content\": text}; got 'a'."),
        ({**GOOD, "prompt": [said("user", 3)]}, "message 1 has a number as its content; it must be text."),
        ({**GOOD, "prompt": [said("user", [{"type": "image"}])]}, "message 1 has a part of type 'image'; every part"),
        ({**GOOD, "prompt": [said("user", [{"type": "text", "text": None}])]}, "has a part of {'text': None, 'type':"),
        ({**GOOD, "prompt": [said("user", ["a"])]}, "has a part of 'a'; every part must be"),
        ({**GOOD, "prompt": [said("user", [])]}, "the user turn of the prompt is empty"),
        ({"prompt": [said("system", "s"), ASK], "chosen": [ASK, GOOD_TURN], "rejected": [ASK, BAD_TURN]},
         "are not those of the prompt. Leave out the prompt, or those turns."),
        ({**GOOD, "chosen": "No. "}, "chosen and rejected are the same answer, 'No. '."),
    ],
    ids=range(32),
)  # fmt: skip
def test_a_record_that_is_no_pair_says_what_it_has_and_what_to_change(record: object, message: str) -> None:
    assert message in refusal(record)


@pytest.mark.quick
def test_content_in_text_parts_and_empty_extra_keys_of_messages_are_read() -> None:
    parts = [{"type": "text", "text": "Wh", "image": None}, {"type": "text", "text": "y?"}]
    turns = [said("user", parts, name=None, tool_calls=[])]
    record: dict[str, object] = {**GOOD, "prompt": turns, "chosen": [said("assistant", [parts[0]])]}
    assert Pairs.from_records([record])[0] == Pair(PAIR.prompt, "Wh", "No.")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Pairs.from_records("a.jsonl"), "Records are a list of objects; got text."),
        (lambda: Pairs.from_records(GOOD), "Records are a list of objects; got an object."),
        (lambda: Pairs.from_records(None), "got null"),
        (lambda: Pairs([GOOD]), "Pair 1 is an object, not a Pair."),
        (lambda: Pairs([Pair("Why?", "a", "b")]), "Pair 1: the prompt is text; it must be a tuple of Messages."),
        (lambda: Pairs([Pair((ASK,), "a", "b")]), "it must be a tuple of Messages."),
        (lambda: Pairs([Pair(PAIR.prompt, None, "b")]), "Pair 1: the chosen answer is null; it must be text."),
        (lambda: Pairs([Pair(PAIR.prompt, "a", "b", {"chosen": 1})]), "its meta has a field 'chosen'"),
        (lambda: Pairs([Pair(PAIR.prompt, "a", "b", {"x": {1}})]).save("x.jsonl"), "Pair 1: its field 'x' cannot be"),
        (lambda: Pairs([Pair(PAIR.prompt, "a", "b", {"x": float("nan")})]).save("x.json"), "not JSON compliant"),
        (lambda: Pairs.from_records([GOOD, {**GOOD, "chosen": "No.", "rejected": "Because."}], duplicates="drop"),
         "There are no pairs left: all 2 contradict each other"),
    ],
    ids=range(11),
)  # fmt: skip
def test_pairs_of_the_wrong_type_are_errors_too(
    call: Callable[[], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PairsError, match=re.escape(message)):
        call()
    assert not list(tmp_path.iterdir())


# Learning and tuning


def some(n: int, start: int = 0) -> Pairs:
    return Pairs(
        Pair((Message("user", f"q{i}"),), f"answer! {i % 10}", f"answer? {i % 10}") for i in range(start, start + n)
    )


def test_learning_from_one_pair_works_with_a_warning_and_two_pairs_bring_none() -> None:
    model, tokenizer = pico.model(), pico.tokenizer()
    for method in ("palrs", "diffmean", "pca", "random"):
        with pytest.warns(TrimtabWarning, match="There is one pair, so no halves"):
            knob = learn(model, tokenizer, some(1), method=method)
        assert "one pair" in knob.diagnostics["warnings"][0]
        assert knob.gain > 0
    with pytest.raises(PairsError, match="probe_auc needs at least 4"):
        learn(model, tokenizer, some(1), selection="probe_auc")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrimtabWarning)
        learn(model, tokenizer, some(2), selection="max_relative_norm")


def test_pairs_that_do_not_fit_the_context_are_counted_and_the_longest_is_named() -> None:
    long = Pair((Message("user", "q" * 300),), "a", "b" * 9)
    longer = Pair((Message("user", "q" * 300),), "a", "b" * 99)
    with pytest.raises(PairsError) as caught:
        learn(pico.model(), pico.tokenizer(), some(3) + Pairs([long, longer]))
    expected = r"Pair 5 is \d+ tokens long when rendered with its rejected answer; this model's context holds 256. "
    assert re.match(expected + r"Leave long pairs out \(2 of 5\)\.", str(caught.value))


def test_tuning_warns_of_prompts_that_learning_has_seen_and_of_no_others() -> None:
    model, tokenizer = pico.model(), pico.tokenizer()
    knob = learn(model, tokenizer, some(6), selection="max_relative_norm")
    options: dict[str, Any] = {"gains": (0.2,), "broken_budget": 1.0, "agreement": -1.0, "dose_response": False}
    other_answers = Pairs(Pair(pair.prompt, f"yes {n}", f"no {n}") for n, pair in enumerate(some(2)))

    def said_of(pairs: Pairs) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tune(knob, model, tokenizer, pairs, **options)
        return [str(w.message) for w in caught if "was learned from" in str(w.message)]

    assert "these very pairs" in said_of(some(6))[0]
    assert "was learned from 2 of these 5 prompts" in said_of(other_answers + some(3, start=10))[0]
    assert said_of(some(3, start=10)) == []


# The command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico")
    pico.model().save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "hello", "Cannot tell what 'a.txt' holds"),
        ("a.jsonl", b"PAR1\x00\x00", "a.jsonl: The file is not text"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', "a.jsonl: Line 1 is not UTF-8: byte 16 of the line is 0xe9."),
        ("a.jsonl", '{"question": "a", "answer": "b"}', "Rename 'question' to 'prompt' and 'answer' to 'chosen'."),
        ("a.jsonl", '{"a":' * 100_000, "a.jsonl: Line 1 cannot be read: it is nested too deeply: more than 100"),
        ("a.csv", "prompt;chosen;rejected\na;b;c\n", "a.csv: Line 1 has one column"),
        ("a.parquet", "hello", "a.parquet: The file cannot be read as Parquet"),
        ("a.jsonl", jsonl({**GOOD, "prompt": "w" * 300}), "Leave long pairs out"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("verb", ["learn", "tune"])
def test_bad_pairs_are_one_line_on_stderr_for_every_verb_that_reads_them(
    write: Write,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    name: str,
    data: str | bytes,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(name, data)
    pico.knob().save("k.safetensors")
    words = {"learn": ["learn", str(model), name], "tune": ["tune", str(model), "--knob", "k.safetensors"]}[verb]
    words += ["--pairs", name] if verb == "tune" else []
    assert main([*words, "--out", "x.safetensors"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("trimtab: ")
    assert message in err
    assert not Path("x.safetensors").exists()


def test_a_task_that_is_nested_too_deeply_is_a_mistake_and_no_traceback(
    write: Write, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", jsonl(GOOD))
    write("deep.jsonl", '{"a":' * 100_000)
    pico.knob().save("k.safetensors")
    words = ["tune", str(model), "--knob", "k.safetensors", "--pairs", "a.jsonl", "--task", "deep.jsonl"]
    assert main([*words, "--out", "x.safetensors"]) == 2
    assert "deep.jsonl: Line 1 cannot be read: it is nested too deeply" in capsys.readouterr().err


@pytest.mark.quick
def test_reading_pairs_never_raises_anything_else(write: Write) -> None:
    # Prefixes of good files, and good files with one byte changed: an error of ours, or pairs.
    lines = jsonl(GOOD, {**GOOD, "prompt": [ASK], "chosen": [said("assistant", "é")]}).encode()
    rows = table(["prompt", "chosen", "rejected"], ["Why?", [GOOD_TURN], "No, \n no"]).encode()
    columns = write_parquet(write("a.parquet", b""), prompt=[[ASK]], chosen=["a"], rejected=["b"]).read_bytes()
    for suffix, good in (("jsonl", lines), ("json", lines), ("csv", rows), ("tsv", rows), ("parquet", columns)):
        outcomes: list[bool] = []
        for cut in range(0, len(good), 1 + len(good) // 50):
            for data in (good[:cut], good[:cut] + bytes([cut * 37 % 256]) + good[cut + 1 :]):
                try:
                    outcomes.append(len(Pairs.load(write(f"a.{suffix}", data))) > 0)
                except TrimtabError:
                    outcomes.append(False)
        assert len(outcomes) > 50
        assert any(outcomes) == (suffix in ("jsonl", "csv", "parquet"))


def test_tune_does_not_write_over_the_knob_that_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    knob = tmp_path / "a.knob.safetensors"
    pico.knob().save(knob)
    before = knob.read_bytes()
    given = ["--knob", str(knob), "--pairs", "prefworld:math", "--out", str(tmp_path / "." / knob.name)]
    assert main(["tune", "prefworld", *given]) == 2
    assert "is the knob itself" in capsys.readouterr().err
    assert knob.read_bytes() == before
