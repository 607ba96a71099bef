"""The engines that are compared, each in processes of its own: `python rows.py ROW FOLDER` writes FOLDER/ROW.json."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import load  # noqa: E402
import torch  # noqa: E402

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "gpu_memory_utilization": 0.1,
    "max_num_seqs": 16,
    "max_loras": 4,
}
"""Options of every engine here; as many adapters as there are settings of weight knobs, and one for the others."""
EAGER: dict[str, Any] = {"enforce_eager": True}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM would want a NUMA node for each of two workers
}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
INTERPRETED = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
LIMIT = 420
"""Seconds that a row may take."""


@dataclass
class Row:
    """One engine."""

    said: str
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    weights: bool = True
    """Whether weight knobs are among the requests: on a CPU adapters turn compilation off, which this vLLM's pipelines
    cannot do without there, and on a GPU their kernels take no float32."""
    nodes: int = 0
    """Servers over HTTP that make one engine; 0 for none."""
    gpu: bool = False
    """Whether it takes an NVIDIA GPU; others are for a CPU."""


TWO_NODES = {"nnodes": 2, "tensor_parallel_size": 2, "master_addr": "127.0.0.1"}
TRITON: dict[str, Any] = {"attention_config": {"backend": "TRITON_ATTN"}}
EXACT = {**IN_PROCESS, "TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}
"""Without these float32 is TensorFloat-32 in Triton's kernels, of 10 bits."""
FIRST = {**EXACT, "VLLM_USE_V2_MODEL_RUNNER": "0"}
FULL: dict[str, Any] = {**TRITON, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}}
ROWS = {
    "in-process": Row("vLLM in process, V1 runner, eager", EAGER, IN_PROCESS),
    "compiled": Row("vLLM in process, V1 runner, torch.compile", {}, IN_PROCESS, weights=False),
    "v2": Row("vLLM in process, V2 runner (Triton interpreted)", EAGER, {**IN_PROCESS, **INTERPRETED}),
    "processes": Row("vLLM in three processes, V1 runner, eager", EAGER),
    "server": Row("vLLM server over HTTP, `trimtab serve`", EAGER, nodes=1),
    "tensor-parallel": Row("vLLM, tensor parallel 2", {**EAGER, "tensor_parallel_size": 2}),
    "pipeline-parallel": Row("vLLM, pipeline parallel 2, torch.compile", {"pipeline_parallel_size": 2}, weights=False),
    "two-nodes": Row("vLLM over HTTP, two nodes on loopback, tensor parallel 2", {**EAGER, **TWO_NODES}, nodes=2),
    "graphs": Row("vLLM on a GPU, V2 runner, compiled, CUDA graphs", TRITON, EXACT, weights=False, gpu=True),
    "graphs-full": Row("vLLM on a GPU, V2 runner, full CUDA graphs", FULL, EXACT, weights=False, gpu=True),
    "graphs-v1": Row("vLLM on a GPU, V1 runner, compiled, CUDA graphs", TRITON, FIRST, weights=False, gpu=True),
}


def can_run(*, gpu: bool) -> bool:
    """Tell whether there is a vLLM for an engine's device."""
    return find_spec("vllm") is not None and torch.cuda.is_available() == gpu


def environment(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an engine's processes."""
    return {**os.environ, **QUIET, "VLLM_CACHE_ROOT": str(folder / "cache"), **variables}


def run(name: str, folder: Path) -> tuple[list[load.Answer], dict[str, Any]] | None:
    """Run a row in a process of its own, and return its answers; None where there is no vLLM for it.

    Raises `RuntimeError` with the end of its log where it fails.
    """
    if not can_run(gpu=ROWS[name].gpu):
        return None
    return run_apart(["rows.py", name, str(folder)], environment(folder, ROWS[name].variables), folder / name)


def run_apart(
    words: Sequence[str], variables: Mapping[str, str], result: Path
) -> tuple[list[load.Answer], dict[str, Any]]:
    """Run a script of this folder, and return what it has written; see `run`."""
    log = result.with_suffix(".log")
    with log.open("w") as file:
        command = [sys.executable, str(HERE / words[0]), *words[1:]]
        done = subprocess.run(command, env=dict(variables), stdout=file, stderr=file, timeout=LIMIT, check=False)
    if done.returncode:
        raise RuntimeError(f"{result.name} failed:\n{log.read_text()[-3000:]}")
    return load.read_answers(result.with_suffix(".json"))


def knob_files(folder: Path, *, weights: bool) -> dict[str, str]:
    """Return the paths that `load.save` has written."""
    return {name: str(folder / f"{name}.knob.safetensors") for name in load.rack(weights=weights)}


def answer_offline(folder: Path, row: Row) -> tuple[list[load.Answer], dict[str, Any]]:
    """Answer all requests in one batch of `vllm.LLM`."""
    from vllm import LLM

    from trimtab.engines.vllm.launch import engine_options

    rack = load.rack(weights=row.weights)
    settings = {"knobs": knob_files(folder, weights=row.weights)}
    engine = LLM(model=str(folder / "model"), **engine_options(rack, settings, {**SIZES, **row.options}))
    answers = ask(engine, load.requests(weights=row.weights))
    return answers, {"runner": runner_of(engine)}


def ask(
    engine: Any, requests: Sequence[load.Request], new: int = load.NEW, *, plain: bool = False
) -> list[load.Answer]:
    """Answer requests greedily, with the log-probability of each token; `plain` ones say nothing of knobs."""
    from vllm import SamplingParams

    greedy = {"temperature": 0, "max_tokens": new, "ignore_eos": True, "logprobs": 0}
    params = [SamplingParams(**greedy, extra_args=None if plain else {"knobs": r.knobs}) for r in requests]
    made = engine.generate([{"prompt_token_ids": request.ids} for request in requests], params, use_tqdm=False)
    outputs = [answer.outputs[0] for answer in made]
    return [load.Answer(list(out.token_ids), [*map(_logprob, out.token_ids, out.logprobs)]) for out in outputs]


def _logprob(token: int, scores: Mapping[int, Any]) -> float:
    return scores[token].logprob


def runner_of(engine: Any) -> str:
    """Say which class runs the model, where it runs in this process."""
    executor = getattr(getattr(engine.llm_engine, "model_executor", None), "driver_worker", None)
    runner = getattr(getattr(executor, "worker", None), "model_runner", None)
    return "" if runner is None else f"{type(runner).__module__}.{type(runner).__name__}"


# Servers


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(folder: Path, row: Row, *more: str) -> Iterator[str]:
    """Start `trimtab serve`, on as many nodes as the row has, and return where it listens."""
    port, meeting = free_port(), free_port()
    knobs = knob_files(folder, weights=row.weights)
    shared = {**SIZES, **row.options, **({"master_port": meeting} if row.nodes > 1 else {})}
    with ExitStack() as stack:
        for node in range(row.nodes):
            own: dict[str, Any] = {"node_rank": node, **({"headless": True} if node else {})} if row.nodes > 1 else {}
            words = [sys.executable, "-m", "trimtab", "serve", str(folder / "model"), "--engine", "vllm"]
            words += ["--dose", "free", "--port", str(port), *more]
            for name, path in knobs.items():
                words += ["--knob", f"{name}={path}"]
            for name, value in {**shared, **own}.items():
                words += ["--engine-option", f"{name}={json.dumps(value) if not isinstance(value, str) else value}"]
            log = stack.enter_context((folder / f"node{node}.log").open("w"))
            process = subprocess.Popen(words, stdout=log, stderr=log, env=dict(os.environ))
            stack.callback(stop, process)
        wait_for(f"http://127.0.0.1:{port}/health", [process], folder)
        yield f"http://127.0.0.1:{port}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server as its user would."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(address: str, processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if any(process.poll() is not None for process in processes):
            break
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("node*.log")))
    raise RuntimeError(f"The server did not start:\n{logs}")


def post(address: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Send a request, and return the status and the content of the answer."""
    data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def answer_served(folder: Path, row: Row) -> tuple[list[load.Answer], dict[str, Any]]:
    """Answer all requests through a server, all at the same time."""
    requests = load.requests(weights=row.weights)
    answers: list[load.Answer | None] = [None] * len(requests)
    with served(folder, row) as address:

        def one(number: int) -> None:
            request = requests[number]
            body = {
                "model": str(folder / "model"),
                "prompt": request.ids,
                "max_tokens": load.NEW,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 1,
                "return_token_ids": True,
                "knobs": request.knobs,
            }
            status, content = post(f"{address}/v1/completions", body)
            assert status == 200, content
            choice = content["choices"][0]
            answers[number] = load.Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [answer for answer in answers if answer is not None], {}


def main(name: str, folder: Path) -> None:
    """Run a row here."""
    row = ROWS[name]
    if "TRITON_INTERPRET" in row.variables:
        import interpreted  # noqa: F401
    answers, facts = answer_served(folder, row) if row.nodes else answer_offline(folder, row)
    load.write_answers(folder / f"{name}.json", answers, facts)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
