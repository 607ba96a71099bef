"""Measure what Trimtab costs, beside the bare forward pass and its peers; write docs/benchmarks.md, plots and a record.

    python -m benchmarks.run                        # `make bench`: everything, some hours on two cores
    python -m benchmarks.run --quick                # a smoke run on tiny models, which shows that all runs
    python -m benchmarks.run --only "generate-*,start"
    python -m benchmarks.run --profile capture-100-share-0 --way trimtab
    python -m benchmarks.run --device cuda --model-size 7b

Rounds are kept as they come, in build/benchmarks/: a run stopped by Ctrl-C writes what it has, a stopped run is taken
up again, and --fresh measures again. What is not measured stays as the last record of the same device has it.
Start it from the repository's root. The peers are left out where their environment (`make .venv-peers/.peers`) is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import DTYPES, OURS, SIZES, THEIRS, Case, Side, all_cases, on_accelerator, quick
from benchmarks.page import write_page
from benchmarks.state import State, all_kept, file_of, take_up
from benchmarks.wire import ROOT, Worker, WorkerDied

BUILD = ROOT / "build" / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
QUICK_ROUNDS = 2


def main() -> None:
    """Measure, or profile, and write what was found."""
    args = arguments()
    cases = chosen(args)
    if args.list:
        print("\n".join(f"{case.name:40} {case.about}" for case in cases))
        return
    if args.profile:
        print(profile(args, next(case for case in cases if case.name == args.profile)))
        return
    device = f"{args.device}-{args.model_size}" if args.accelerator else args.device
    folder = BUILD / ("quick" if args.quick else "full") / device
    if args.fresh:
        for case in cases:
            for threads in args.threads:
                file_of(folder, case.name, threads).unlink(missing_ok=True)
    try:
        for threads in args.threads:
            if not measure_all(cases, args, threads, folder):
                print(f"No accelerator: what --device {args.device} measures is left out.")
                return
    except KeyboardInterrupt:
        say("Stopped; what was measured so far is written.")
    write(args, folder)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of every case, some of which take more or fewer (default 9)")
    parser.add_argument("--threads", help="numbers of threads, in turn (default 1,2; in a smoke run 1)")
    parser.add_argument("--only", default="*", help="names of cases, with * for any letters, between commas")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: tiny models, two rounds; writes to build/ alone"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--list", action="store_true", help="show the cases")
    parser.add_argument("--profile", metavar="CASE", help="show where the time of a case goes, and measure nothing")
    parser.add_argument("--way", help="of the case that is profiled (default: all of Trimtab's)")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="their Python")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="what the models run on")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the model on an accelerator")
    parser.add_argument("--model-size", choices=SIZES, help="of the model on an accelerator (default 1b)")
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds is 1 or more; got {args.rounds}.")
    if args.way and not args.profile:
        parser.error("--way goes with --profile.")
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else 9)
    cores = machine.usable_cores()
    wanted = (args.threads or ("1" if args.quick or cores < 2 else "1,2")).split(",")
    if not all(count.isdecimal() and 1 <= int(count) <= cores for count in wanted):
        parser.error(f"--threads are numbers from 1 to the {cores} cores here, as in 1,2; got {args.threads}.")
    args.threads = [*map(int, wanted)]
    # A CPU takes an accelerator's cases too, where a size is named: that shows that they run.
    args.accelerator = args.device != "cpu" or args.model_size is not None
    args.model_size = args.model_size or "1b"
    return args


def chosen(args: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for, as large as is asked for."""
    cases = all_cases()
    if args.quick:
        cases = [quick(case) for case in cases]
    if args.accelerator:
        cases = on_accelerator(cases, args.model_size, args.device, args.dtype)
        args.threads = args.threads[:1]
    patterns = [args.profile] if args.profile else args.only.split(",")
    if args.profile and "*" in args.profile:
        sys.exit("--profile takes one case.")
    strays = [pattern for pattern in patterns if not any(fnmatchcase(case.name, pattern) for case in cases)]
    if strays:
        sys.exit(f"No case is called {strays[0]!r}. Known: {', '.join(case.name for case in cases)}.")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# Measuring


def crew(args: argparse.Namespace, threads: int) -> dict[Side, Worker]:
    """Return a worker for each environment that is there; processes start when they are asked."""
    log = BUILD / "workers.log"
    found: dict[Side, Worker] = {OURS: Worker(Path(sys.executable), OURS, threads, log)}
    if args.peers.exists():
        found[THEIRS] = Worker(args.peers, THEIRS, threads, log)
    else:
        say("The peers' environment is not there, and they are left out.")
    return found


def measure_all(cases: Sequence[Case], args: argparse.Namespace, threads: int, folder: Path) -> bool:
    """Measure what is not yet measured with one number of threads; False where the accelerator is not there."""
    workers = crew(args, threads)
    try:
        versions = started(workers)
        if args.device != "cpu" and "accelerator" not in versions[OURS]:
            return False
        for number, case in enumerate(cases, 1):
            if case.once and threads != args.threads[0]:
                continue
            state = take_up(folder, case, threads, max(1, round(args.rounds * case.rounds)))
            if state.done:
                continue
            begun = time.monotonic()
            state.versions = {side: versions[side] for side in case.sides if side in versions}
            measure(case, state, {side: workers[side] for side in case.sides if side in workers}, folder)
            say(f"{threads} threads, {number} of {len(cases)}: {case.name}, {time.monotonic() - begun:.0f} s")
            tell_failures(state)
    finally:
        for worker in workers.values():
            worker.stop()
    return True


def started(workers: dict[Side, Worker]) -> dict[Side, dict[str, str]]:
    """**Take peers that do not start out of `workers`**; return what the others are made of."""
    found: dict[Side, dict[str, str]] = {}
    for side, worker in [*workers.items()]:
        try:
            found[side] = worker.versions()
        except WorkerDied as death:
            if side == OURS:
                raise
            del workers[side]
            log = worker.log.relative_to(ROOT)
            say(f"The peers' environment does not start ({death}; see {log}), and they are left out.")
    return found


def measure(case: Case, state: State, workers: dict[Side, Worker], folder: Path) -> None:
    """Run every way of a case in every round that is missing, and keep each round."""
    state.cannot = {}  # what failed is tried again
    order = opened(case, state, workers)
    runs = 0 if case.fresh or case.rounds < 1 else 1  # the first one warms up, where a run does not take minutes
    for side, way in order * runs:
        run_once(case, state, workers[side], way)
    while not state.done:
        state.load.append(machine.load())
        found: dict[str, dict[str, Any]] = {}
        if case.fresh == "round":
            state.cannot |= {side: {"all": why} for side in workers if (why := renew(case, state, workers[side]))}
        turn = order if len(state.rounds) % 2 == 0 else order[::-1]
        for side, way in turn:
            if {way, "all"} & {*state.cannot.get(side, {})}:
                continue
            if measured := run_once(case, state, workers[side], way):
                found.setdefault(side, {})[way] = measured
        state.rounds.append(found)
        state.save(folder)


def opened(case: Case, state: State, workers: dict[Side, Worker]) -> list[tuple[Side, str]]:
    """Open a case in every environment; return its sides and ways."""
    order: list[tuple[Side, str]] = []
    for side, worker in workers.items():
        answer = worker.open(case.kind, case.options)
        if "cannot" in answer:
            state.cannot[side] = {"all": answer["cannot"]}
            continue
        ways = [way for way in answer["ways"] if not case.ways or way in case.ways]
        state.bases[side] = ways[0]
        state.before[side] = answer["peak_mb"]
        order += [(side, way) for way in ways]
    return order


def run_once(case: Case, state: State, worker: Worker, way: str) -> dict[str, Any]:
    """Run a way; return what was measured, or nothing where it cannot run, which is noted."""
    why = renew(case, state, worker) if case.fresh == "run" else ""
    answer = {"cannot": why} if why else worker.run(way)
    if "cannot" in answer:
        state.cannot.setdefault(worker.side, {})[way] = answer["cannot"]
        return {}
    return answer


def renew(case: Case, state: State, worker: Worker) -> str:
    """Open a case in a new process; return why it cannot be, or nothing."""
    worker.stop()
    answer = worker.open(case.kind, case.options)
    if "cannot" not in answer:
        state.before[worker.side] = answer["peak_mb"]
    return answer.get("cannot", "")


def tell_failures(state: State) -> None:
    """Say what could not be run."""
    for side, ways in state.cannot.items():
        for way, why in ways.items():
            say(f"  {side}, {way}: {why}")


def profile(args: argparse.Namespace, case: Case) -> str:
    """Return where the time of a case's ways goes, on the first number of threads."""
    if case.kind == "step":
        sys.exit(f"The ways of {case.name} run together. Profile generate-{case.options['rows']}.")
    workers = crew(args, args.threads[0])
    found: list[str] = []
    known: list[str] = []
    try:
        for side in (side for side in case.sides if side in workers):
            answer = workers[side].open(case.kind, case.options)
            if "cannot" in answer:
                sys.exit(f"{case.name} cannot run: {answer['cannot']}.")
            known += answer["ways"]
            ways = [args.way] if args.way in answer["ways"] else answer["ways"] if side == OURS and not args.way else []
            found += [f"== {case.name}: {side}, {way}\n{workers[side].profile(way)}" for way in ways]
    finally:
        for worker in workers.values():
            worker.stop()
    if not found:
        sys.exit(f"No way of {case.name} is called {args.way!r}. Known: {', '.join(known)}.")
    return "\n".join(found)


# Writing


def write(args: argparse.Namespace, folder: Path) -> None:
    """Write the record of all that is kept, and the page; those of a smoke run stay in the build folder.

    Cases that are not kept are taken over from the last record of the same device and model, each with its own date.
    """
    states = all_kept(folder)
    if not states:
        sys.exit("Nothing was measured.")
    facts = machine.facts()
    name = states[-1].versions.get(OURS, {}).get("accelerator") if args.device != "cpu" else facts["processor"]
    names = ("rounds", "threads", "only", "quick", "device", "dtype", "model_size")
    device = {"kind": args.device, "name": name, "model": args.model_size if args.accelerator else "small"}
    apart = args.quick or (args.accelerator and args.device == "cpu")
    results = folder / "results" if apart else RESULTS
    before = [case for record in newest(results) if record["device"] == device for case in record["cases"]]
    cases = {(case["case"], case["threads"]): case for case in [*before, *map(asdict, states)]}
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "machine": facts,
        "arguments": {argument: getattr(args, argument) for argument in names},
        "cases": [*cases.values()],
    }
    results.mkdir(parents=True, exist_ok=True)
    suffix = f"-{args.model_size}" if args.accelerator else ""
    path = results / f"{record['date']}-{machine.slug(str(name))}{suffix}.json"
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
    page = write_page(newest(results), folder if apart else DOCS)
    say(f"Wrote {path.relative_to(ROOT)} and {page.relative_to(ROOT)}.")


def newest(results: Path) -> list[dict[str, Any]]:
    """Return the latest record of each device and size of model, processors first."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        device = record["device"]
        found["" if device["kind"] == "cpu" else device["kind"], str(device["name"]), device["model"]] = record
    return [record for _, record in sorted(found.items())]


if __name__ == "__main__":
    main()
