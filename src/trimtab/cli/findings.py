"""What an evaluation found, as sentences with a table below each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Table(NamedTuple):
    """A sentence, and the table below it."""

    sentence: str
    heads: Sequence[str]
    rows: Sequence[Sequence[object]]


def evaluation_tables(record: Row) -> list[Table]:
    """Return what the first setting of an evaluation's record did, most important first."""
    bare, steered = record["bare"], next(iter(record["settings"]), None)
    made = [_tasks(bare, steered), _sides(bare, steered), _preference(bare, steered), _effects(record, bare, steered)]
    judged = _judged(steered["judge"]) if steered and "judge" in steered else None
    return [table for table in [*made, judged, _cost(bare, steered)] if table is not None]


def _both(bare: Row, steered: Row | None) -> list[tuple[str, Row]]:
    return [("bare", bare), *([] if steered is None else [(str(steered["setting"]), steered)])]


def _tasks(bare: Row, steered: Row | None) -> Table | None:
    if not bare["tasks"]:
        return None
    rows: list[list[object]] = []
    said: list[str] = []
    for i, row in enumerate(bare["tasks"]):
        label = row["task"] + (", sampled" if row["mode"] == "sampled" else "")
        for setting, entry in _both(bare, steered):
            own: Row = entry["tasks"][i]
            change, accuracy = own.get("difference"), own.get("accuracy")
            right = [None, None] if accuracy is None else [_percent(accuracy["estimate"]), _ends(accuracy)]
            gain = [None, None] if change is None else [_signed(change["estimate"]), _ends(change, signed=True)]
            kl = own.get("kl")
            broken, tokens = own.get("broken"), own.get("tokens")
            manner: list[object] = [None if broken is None else _percent(broken)]
            manner += [None if tokens is None else f"{tokens:.1f}", None if kl is None else f"{kl['estimate']:.3g}"]
            rows.append([label, row["role"], row["n"], setting, *right, *gain, _p(own.get("p_holm")), *manner])
        if steered is not None and row["role"] == "task":
            own = steered["tasks"][i]
            change, p = own["difference"], own.get("p_holm")
            said.append(
                f"{label}: {_percent(own['accuracy']['estimate'])} % right with the setting and "
                f"{_percent(row['accuracy']['estimate'])} % without it ({_signed(change['estimate'])}; "
                f"{_ends(change, signed=True)}{'' if p is None else f'; p {_p(p)}'})."
            )
    heads = ["task", "role", "n", "setting", "right", "95 %", "gain", "95 %", "p (Holm)", "broken", "tokens", "KL"]
    right = "Percent right; " if any("accuracy" in row for row in bare["tasks"]) else "Answers to the pairs' prompts; "
    unit = f"{right}percent broken (empty, cut, repeating); tokens per answer; KL to base in nats per token."
    return Table("\n".join([*said, unit]), heads, rows)


def _sides(bare: Row, steered: Row | None) -> Table | None:
    rows: list[list[object]] = []
    for i, row in enumerate(bare["tasks"]):
        found = _both(bare, steered)
        names = dict.fromkeys(side for _, entry in found for side in entry["tasks"][i].get("sides", {}))
        if row["role"] != "task" or len(names) < 2:
            continue
        for setting, entry in found:
            sides: Row = entry["tasks"][i].get("sides", {})
            for side in names:
                own = sides.get(side, {"share": 0.0, "accuracy": None})
                inside = None if own["accuracy"] is None else _percent(own["accuracy"])
                if own["share"]:
                    rows.append([row["task"], row["mode"], setting, side, _percent(own["share"]), inside])
    heads = ["task", "answers", "setting", "side", "share", "right within"]
    said = "Sides of the answers, and percent right within each: more on one side is a change of manner."
    return Table(said, heads, rows) if rows else None


def _preference(bare: Row, steered: Row | None) -> Table | None:
    if "preference" not in bare:
        return None
    rows: list[list[object]] = []
    for setting, entry in _both(bare, steered):
        own: Row = entry["preference"]
        rows.append([setting, _percent(own["accuracy"]["estimate"]), _ends(own["accuracy"]), *_number(own["margin"])])
        change = own.get("margin_difference")
        rows[-1] += [None, None] if change is None else _number(change, signed=True)
    heads = ["setting", "preferred", "95 %", "margin", "95 %", "change", "95 %"]
    said = f"Of {bare['preference']['n']} pairs, percent whose chosen answer is likelier, and its margin in nats."
    return Table(said, heads, rows)


def _effects(record: Row, bare: Row, steered: Row | None) -> Table | None:
    rows: list[list[object]] = []
    if steered is not None:
        effects: Row = steered["side_effects"]
        for name, label in (
            ("broken", "broken answers, %"),
            ("repetition", "repeated 4-grams, %"),
            ("tokens", "tokens"),
        ):
            if name in effects:
                own, scale = effects[name], 1 if name == "tokens" else 100
                change = {end: scale * value for end, value in own["change"].items()}
                before, after = (f"{scale * own[side]:.1f}" for side in ("bare", "steered"))
                rows.append([label, before, after, *_number(change, signed=True)])
        if effects["kl"]:
            label = f"KL to base on {', '.join(effects['kl_on'])}, nats per token"
            rows.append([label, "0", f"{effects['kl']['estimate']:.3g}", *_number(effects["kl"], signed=True)])
    if "neutral" in bare:
        read = [entry["neutral"] for _, entry in _both(bare, steered)]
        blank = [None] * (2 - len(read))
        rows.append(["perplexity of neutral text", *(f"{own['perplexity']:.4g}" for own in read), *blank, None, None])
        change = _number(read[1]["change"], signed=True) if len(read) > 1 else [None, None]
        nats = [f"{own['nats_per_token']:.3f}" for own in read]
        rows.append(["its nats per token", *nats, *blank, *change])
        rows.append(["its bits per byte", *(f"{own['bits_per_byte']:.3f}" for own in read), *blank, None, None])
    if not rows:
        return None
    said = ["Side effects, over all greedy answers."]
    if "neutral" in bare:
        parts = [f"{k['knob']} steers {k['steered_of_neutral']}" for dose in record["spec"]["settings"] for k in dose]
        said.append(f"Neutral text has no prompt{': there ' if parts else ''}{', '.join(parts)}.")
    return Table(" ".join(said), ["measure", "bare", "steered", "change", "95 %"], rows)


def _judged(own: Row) -> Table:
    rate, equal = own["win_rate"], own["win_rate_at_equal_length"]
    won = "no verdict" if rate is None else f"{_percent(rate['estimate'])} % ({_ends(rate)})"
    fair = (
        "cannot be told: one side is always longer"
        if equal is None
        else f"{_percent(equal['estimate'])} % ({_ends(equal)})"
    )
    said = f"The judge prefers steered answers to bare ones in {won}, ties half; at equal length: {fair}."
    shares = [
        None if own[name] is None else _percent(own[name]) for name in ("agreement", "position_bias", "first_share")
    ]
    counts = [own[name] for name in ("pairs", "wins", "losses", "ties", "malformed_replies", "calls")]
    heads = ["pairs", "wins", "losses", "ties", "malformed", "calls", "orders agree, %", "same place, %", "first, %"]
    return Table(said, heads, [[*counts, *shares]])


def _cost(bare: Row, steered: Row | None) -> Table | None:
    if not bare["cost"]["answers"]:
        return None
    rows: list[list[object]] = []
    for setting, entry in _both(bare, steered):
        own: Row = entry["cost"]
        memory = None if own["peak_bytes"] is None else f"{own['peak_bytes'] / 2**20:.0f}"
        rows.append([setting, own["answers"], f"{own['seconds']:.2f}", own["tokens"], memory])
    heads = ["setting", "answers", "seconds", "tokens", "peak, MiB"]
    return Table("Cost of answering and grading.", heads, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _ends(found: Row, *, signed: bool = False) -> str:
    write = _signed if signed else _percent
    return f"{write(found['low'])} to {write(found['high'])}"


def _number(found: Row, *, signed: bool = False) -> list[object]:
    sign = "+" if signed else ""
    return [f"{found['estimate']:{sign}.3g}", f"{found['low']:{sign}.3g} to {found['high']:{sign}.3g}"]


def _p(p: float | None) -> str | None:
    return None if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
