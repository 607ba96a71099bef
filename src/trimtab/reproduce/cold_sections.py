"""The sections of the COLD-Steer report: tables, plots, and answers to what the paper's reviewers asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.prefworld.families.surveys import GROUPS
from trimtab.reproduce import cold_plots as plots
from trimtab.reproduce.cold_recipe import SYSTEMS
from trimtab.reproduce.document import Report, Section, percent, points

Row = Mapping[str, Any]
SHOWN = 0.0005
"""The least difference in probability that a table's digits show."""


def sections(report: Report) -> list[Section]:
    """Return the parts of a report, in order."""
    made = [_samples(report), _behaviours(report), _side(report), _learning(report), _doses(report)]
    made += [_writing(report)] if report["writing"] else []
    made += [_opinions(report)] if report["opinions"] else []
    return [*made, _numerics(report), _cost(report), _answers(report)]


def _samples(report: Report) -> Section:
    samples = report["samples"]
    counts = sorted({row["pairs"] for row in samples["rows"]})
    rows: list[list[str]] = []
    for system in dict.fromkeys(row["system"] for row in samples["rows"]):
        own = {row["pairs"]: row for row in samples["rows"] if row["system"] == system}
        rows.append([SYSTEMS[system], *(percent(own[n]["mean"]) for n in counts)])
    text = (
        f"Probability of the matching letter in percent, test questions of {' and '.join(samples['behaviours'])}, mean "
        f"over seeds; the model as it is gives it {percent(samples['base'])}."
    )
    shares = [
        f"{SYSTEMS[row['system']]} from {row['few']} pairs has {100 * row['share'][0]:.0f} % "
        f"({100 * row['share'][1]:.0f} to {100 * row['share'][2]:.0f}) of the effect of {SYSTEMS[row['best']]} from "
        f"{row['many']}"
        for row in samples["headline"]
    ]
    told = [text, *([f"Fifty times fewer: {'; '.join(shares)}."] if shares else [])]
    label = "Probability of the matching letter by number of pairs, one line for each system"
    heads = ("system", *(f"{n} pairs" for n in counts))
    return Section("How many pairs it takes", heads, rows, texts=told, plot=plots.by_pairs(samples), label=label)


def _behaviours(report: Report) -> Section:
    names = list(report["behaviours"][0]["by_behaviour"])
    rows: list[list[str]] = []
    for row in report["behaviours"]:
        gain = row.get("gain")
        said = f"{points(gain[0])} ({points(gain[1])} to {points(gain[2])})" if gain else ""
        rows.append([row["title"], *(percent(row["by_behaviour"][b]) for b in names), said, percent(row["right"])])
    heads = ("system", *names, "gain (95 % interval)", "likelier in")
    text = (
        f"From {report['sizes']['pairs']} pairs: probability of the matching letter in percent; gain over the model as "
        "it is, in points, averaged over behaviours; share of questions where the matching letter is the likelier one."
    )
    return Section("Behaviours by letter", heads, rows, texts=[text])


def _side(report: Report) -> Section:
    rows: list[list[str]] = []
    for row in _steered(report):
        doses = Counter(f"{dose:g}" for dose in row["doses"])
        rows.append(
            [
                row["title"],
                ", ".join(f"{dose} ({count})" for dose, count in sorted(doses.items(), key=lambda d: float(d[0]))),
                _number(row["moved"], 3),
                points(row["others"]),
                percent(row["rails"]),
                _number(row["kl"], 4),
                percent(row["letter_a"]),
            ]
        )
    heads = ("system", "doses chosen (runs)", "last layer moves", "others shift", "guardrails", "KL", "(A)")
    base = report["behaviours"][0]
    text = (
        "Doses are alphas, multiples of weights, shares removed or shots. The last layer's output at the prompts' last "
        "tokens moves by a share of its norm: one axis for every method. Other behaviours shift by so many points, up "
        f"or down; guardrails in percent right (the model as it is: {percent(base['rails'])}); KL in nats per token of "
        f"the base model's answers to them; (A) is that letter's share of probability (as it is: "
        f"{percent(base['letter_a'])})."
    )
    return Section("What else changes", heads, rows, words=(0, 1), texts=[text])


def _learning(report: Report) -> Section:
    rows = [
        [
            row["title"],
            f"{row['learn_seconds']:.1f}",
            f"{row['tune_seconds']:.1f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            str(row["refused"] or ""),
        ]
        for row in _steered(report)
    ]
    heads = ("system", "seconds to learn", "seconds to choose", "largest peak in MB", "runs refused")
    text = f"From {report['sizes']['pairs']} pairs, median over runs; memory is that of the process beyond its start."
    return Section("What it takes to learn", heads, rows, texts=[text])


def _steered(report: Report) -> list[Row]:
    return [row for row in report["behaviours"] if row["system"] not in ("base", "always-a")]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _doses(report: Report) -> Section:
    label = "Validation score by alpha for each system that moves the stream"
    return Section("Doses", plot=plots.by_dose(report["doses"]), label=label)


def _writing(report: Report) -> Section:
    rows = [
        [
            row["domain"],
            row["title"],
            percent(row["on_side"]),
            ", ".join(percent(share) for share in row["by_seed"]),
            percent(row["broken"]),
            _number(row["kl"], 4),
            f"{1000 * row['seconds_per_answer']:.0f}",
        ]
        for row in report["writing"]
    ]
    heads = ("domain", "system", "on the target side", "by seed", "broken", "KL", "ms per answer")
    text = "Greedy answers to test prompts, graded by PrefWorld's own rules; milliseconds are of answers in one batch."
    return Section("Generated answers", heads, rows, words=(1,), texts=[text])


def _opinions(report: Report) -> Section:
    rows = [
        [
            row["title"],
            *(f"{row['own'][g]:.3f}" for g in GROUPS),
            f"{row['kl']:.3f}",
            f"{row['tv']:.3f}",
            f"{row['others']:.3f}",
            f"{row['pooled']:.3f}",
            f"{row['spread']:.3f}",
        ]
        for row in report["opinions"]
    ]
    heads = ("system", *GROUPS, "mean KL", "TV", "others", "pooled", "spread")
    text = (
        "KL in nats from a group's shares to those of the model turned to it, on statements that nothing was learned "
        "from. Others: KL of the same systems to the groups they were not turned to. Pooled: the same "
        "method learned from everybody's answers. Spread: how far the model's shares differ from question to question "
        "(standard deviation)."
    )
    return Section("Opinions of groups", heads, rows, texts=[text])


def _numerics(report: Report) -> Section:
    facts = report["facts"]
    rows = [
        [
            row["loss"],
            row["dtype"],
            f"{row['epsilon']:.0e}",
            f"{100 * row['changed']:.2f}",
            f"{row['cosine']:.4f}",
            f"{row['length']:.3g}",
            "refused" if row["refused"] else "runs",
        ]
        for row in facts["steps"]
    ]
    heads = ("loss", "weights", "epsilon", "% of weights that change", "cosine", "length", "our scaled step")
    said = next((row["refused"] for row in facts["steps"] if row["refused"]), None)
    kernel = facts["kernel"]
    pair = next(value for loss, value in kernel.items() if loss.startswith("dpo"))
    texts = [
        f"The released algorithm at layer {facts['layer']}: epsilon G is added to a copy of the weights, the plain "
        "stream is subtracted, the difference divided by epsilon; cosine with the exact derivative, and length over "
        "its length.",
        *([f"What our code says of such a step: {said}"] if said else []),
        "At the residual stream, eta 1 moves by "
        + ", ".join(
            f"{100 * value['share_of_norm_at_eta_1']:.2g} % of the norm ({loss})" for loss, value in kernel.items()
        )
        + f". Of a pair's gradient the rejected side alone, which the released code keeps, has cosine "
        f"{pair['cosine_of_rejected_side']:.3f} with the whole; the chosen side {pair['cosine_of_chosen_side']:.3f}.",
    ]
    return Section("What the released step computes", heads, rows, texts=texts)


def _cost(report: Report) -> Section:
    speed = report["speed"]
    titles = {"cold-fd": "COLD-FD, scaled step", "cold-fd-exact": "COLD-FD, exact derivative", "one-step": "one step"}
    rows = [
        [str(titles.get(way, way)), f"{ratio:.2f}", _number(speed["of_steps"].get(way), 2)]
        for way, ratio in speed["ratios"].items()
    ]
    text = (
        f"Decoding one row of this model, {1000 * speed['seconds_per_token']:.1f} ms per token without steering. The "
        "count is of plain steps: 1 + (site + 1) / blocks of a scaled step, 1 + 2 (site + 1) / blocks of the exact "
        f"derivative. The knob holds {speed['knob_values']} values; the released copy of the weights up to the site "
        f"would be {speed['weights_of_a_copy']}. At a width of 1,024: `make bench`."
    )
    return Section("Cost per token", ("way", "times plain", "steps counted"), rows, texts=[text])


def _answers(report: Report) -> Section:
    """Answer the reviewers' open questions from the figures above; every number is measured."""
    rows = {row["system"]: row for row in report["behaviours"]}
    texts = [
        text
        for text in (_why_fd(rows), _why_kernel(rows), _why_more(report), _groups(report), _threshold(report))
        if text
    ]
    return Section("Questions that the paper's reviews leave open", texts=texts)


def _mean(row: Row) -> float:
    values = list(row["by_behaviour"].values())
    return sum(values) / len(values)


def _why_fd(rows: Mapping[str, Row]) -> str:
    if not {"cold-fd", "bipo", "bipo-released"} <= rows.keys():
        return ""
    ahead, short, long = (_mean(rows[name]) for name in ("cold-fd", "bipo-released", "bipo"))
    runs = rows["bipo"]["converged"]
    stopped = f"; {sum(runs)} of {len(runs)} runs stopped before their last epoch" if runs else ""
    return (
        f"Why does COLD-FD beat trained interventions? Here COLD-FD reaches {percent(ahead)}. A vector at the top "
        "candidate layer, trained for as long and as fast as the released code trains one, reaches "
        f"{percent(short)}, and trained until validation stops it {percent(long)}{stopped}: training longer brings "
        f"{points(long - short)}, and COLD-FD is {points(ahead - long)} from there."
    )


def _why_kernel(rows: Mapping[str, Row]) -> str:
    names = ("cold-kernel", "cold-kernel-released", "cold-kernel-softmax", "diffmean", "bipo", "random")
    if not set(names) <= rows.keys():
        return ""
    kernel, half, soft, contrast, trained, chance = (percent(_mean(rows[name])) for name in names)
    letters = ", ".join(
        f"{percent(rows[name]['letter_a'])} ({rows[name]['title']})" for name in ("cold-kernel", "diffmean")
    )
    return (
        "Why does COLD-Kernel, which generalises DiffMean, lose to it? With both sides of the pair and a dose of "
        f"its own it reaches {kernel}, from the rejected side alone {half}, with the softmax kernel {soft}; DiffMean "
        f"{contrast}. With options both ways round a shift of the letters alone brings nothing: shares of (A) are "
        f"{letters}. A random direction, chosen in the same way, reaches {chance}; a constant vector that is trained, "
        f"at the same tokens, {trained}."
    )


def _why_more(report: Report) -> str:
    samples = report["samples"]
    counts = sorted({row["pairs"] for row in samples["rows"]})
    if len(counts) < 2:
        return ""
    drops: list[str] = []
    for system in dict.fromkeys(row["system"] for row in samples["rows"]):
        means = {row["pairs"]: row["mean"] for row in samples["rows"] if row["system"] == system}
        top = max(counts, key=lambda n: means[n])
        if means[top] - means[counts[-1]] < SHOWN:
            continue
        drops.append(
            f"{SYSTEMS[system]} is best at {top} pairs and {points(means[counts[-1]] - means[top])} at {counts[-1]}"
        )
    said = f"With doses chosen anew: {'; '.join(drops)}." if drops else "With doses chosen anew, here they do not."
    return f"Why do more examples sometimes hurt? {said}"


def _groups(report: Report) -> str:
    rows = {row["system"]: row for row in report["opinions"]}
    names = ("base", "cold-kernel", "cold-kernel-softmax", "cold-fd")
    if not set(names) <= rows.keys():
        return ""
    bare, unit, soft, ahead = (f"{rows[name]['kl']:.3f} and {rows[name]['spread']:.3f}" for name in names)
    return (
        "How do a group's distributions survive the unit kernel, one vector for all questions? Mean KL, and how far "
        f"answers differ from question to question: the model as it is {bare}; unit kernel {unit}; softmax kernel "
        f"{soft}; COLD-FD {ahead}."
    )


def _threshold(report: Report) -> str:
    rows: Sequence[Row] = report["facts"]["steps"]
    shares = [
        f"{100 * row['changed']:.2g} % at {row['epsilon']:.0e} ({row['loss']})"
        for row in rows
        if row["dtype"] == "float32" and row["epsilon"] in (1e-6, 1e-4, 1e-2)
    ]
    return (
        "How was the threshold on small updates chosen? The share of weights that change at all depends on epsilon "
        f"G beside the spacing of float32 at each weight: {', '.join(shares)}. A few percent are what a small "
        "epsilon leaves."
    )
