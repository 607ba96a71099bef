"""The repository as a whole: imports, layers that only a running process shows, and documents that must not drift."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_socket import SocketConnectBlockedError

import trimtab
from trimtab.cli import parsers
from trimtab.errors import MissingDependency

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "trimtab"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Packages behind an extra: imported in one place, when used.
SERVING = {"fastapi", "uvicorn", "prometheus_client", "httpx"}
DOCUMENTING = {"mkdocs_material", "mkdocstrings"}  # of the site, which the package knows nothing of
OPTIONAL = {"trl", "datasets", "peft", "vllm", "gguf", "lm_eval", "pyarrow", "optuna"} | SERVING

# A plug-in is loaded by those who have its host, and a class needs its base when it is made.
PLUGINS = {"evals/lm_eval.py": "lm_eval"}

# The server is loaded by whoever serves, and nothing else needs what it stands on.
SERVER = "serve/"
ONLY_SERVED = SERVING | {"starlette", "pydantic", "pydantic_core", "anyio"}

# What nobody waits for who only looks at the help: every dependency.
HEAVY = ONLY_SERVED | OPTIONAL | {re.split(r"[^\w-]", needed)[0] for needed in PYPROJECT["project"]["dependencies"]}

# What must work without training, learning or evaluation, and what those are.
RUNTIME = ("runtime", "positions", "thoughts", "artifact", "adapter", "ops", "types", "files", "errors")
BEYOND_RUNTIME = {
    "capture",
    "contrast",
    "evals",
    "learn",
    "tune",
    "train",
    "prefworld",
    "methods",
    "demo",
    "compose",
    "reproduce",
}

# The modules that may use a name, so that what it stands for is done in one way.
ONLY_IN = {
    "register_forward_hook": {"adapter/stream.py", "adapter/aside.py", "engines/vllm/worker.py"},
    "register_forward_pre_hook": {"adapter/stream.py", "adapter/aside.py", "adapter/alone.py"},
    "apply_chat_template": {"render/renderer.py", "evals/lm_eval.py"},  # the harness renders its own, by that name
}


def module_name(path: Path) -> str:
    parts = ("trimtab", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_after(code: str) -> set[str]:
    """Return the names in `sys.modules` of a fresh interpreter that ran `code`."""
    program = f"{code}\nimport json, sys\nprint('MODULES' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rpartition("MODULES")[2]))


def imports_on_load(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, top-level package) for imports that run on loading a module: not in functions, not for types."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module.partition(".")[0]
        pending += ast.iter_child_nodes(node)


def blocks(document: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a document that are in one of the languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def trimtab_command(*words: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from trimtab.cli import main; sys.exit(main())", *words]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_imports(path: Path) -> None:
    try:
        importlib.import_module(module_name(path))
    except MissingDependency as error:
        if path.relative_to(PACKAGE).as_posix() not in PLUGINS:
            raise
        pytest.skip(str(error))


@pytest.mark.quick
@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_module_loads_an_optional_package_before_it_is_used(path: Path) -> None:
    here = path.relative_to(PACKAGE).as_posix()
    allowed = SERVING if here.startswith(SERVER) else {PLUGINS.get(here)}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [hit for hit in imports_on_load(tree) if hit[1] in OPTIONAL - allowed]
    assert not found, f"{path.name}: import {found} inside the function that needs it"


@pytest.mark.quick
@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_the_server_stands_on_web_frameworks(path: Path) -> None:
    served = path.relative_to(PACKAGE).as_posix().startswith(SERVER)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {name for _, name in imports_on_load(tree)} & ONLY_SERVED
    assert served or not found, f"{path.name} imports {found}"


@pytest.mark.quick
@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_hooks_and_chat_templates_are_each_handled_in_one_file(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    here = path.relative_to(PACKAGE).as_posix()
    strays = {name: homes for name, homes in ONLY_IN.items() if name in used and here not in homes}
    assert not strays, f"{module_name(path)} uses what belongs to {strays}"


@pytest.mark.quick
def test_importing_the_package_pulls_in_no_heavy_package() -> None:
    assert not modules_after("import trimtab") & HEAVY


def test_every_public_name_loads_without_an_optional_package() -> None:
    code = "import trimtab\nfor name in trimtab.__all__: getattr(trimtab, name)"
    loaded = modules_after(code)
    assert "trimtab.learn" in loaded  # the names were really loaded
    # transformers itself loads peft, and older ones more, where they are installed: only our own choices are judged.
    theirs = modules_after("from transformers import AutoModelForCausalLM, GenerationMixin")
    assert not loaded & OPTIONAL - theirs


@pytest.mark.quick
def test_the_public_names_are_sorted_and_documented() -> None:
    assert list(trimtab.__all__) == sorted(trimtab.__all__)
    assert set(trimtab.__all__) <= set(dir(trimtab))


def test_the_verbs_stay_functions_after_their_modules_are_imported() -> None:
    # trimtab.learn is a function and trimtab/learn.py a module: importing the module must not hide the function.
    verbs = "for name in ('learn', 'tune', 'generate'): assert callable(getattr(trimtab, name)), name"
    modules_after(f"import trimtab, trimtab.learn, trimtab.tune, trimtab.generate\n{verbs}")
    modules_after(f"from trimtab.cli import main\nimport trimtab\n{verbs}\nfrom trimtab import tune, learn\n{verbs}")


def test_the_runtime_never_pulls_in_training_learning_or_evaluation() -> None:
    loaded = modules_after("\n".join(f"import trimtab.{name}" for name in RUNTIME))
    assert not loaded & ({f"trimtab.{name}" for name in BEYOND_RUNTIME} | OPTIONAL - {"peft"})


@pytest.mark.quick
def test_no_help_imports_a_heavy_package() -> None:
    # One interpreter for all of them: what a verb's help loads would be there after it.
    code = """
from trimtab.cli import VERBS, main
import sys
for words in ([], *([verb] for verb in VERBS)):
    assert not main([*words, "--help"]), words
    found = sorted(HEAVY & sys.modules.keys())
    assert not found, f"trimtab {' '.join(words)} --help imports {found}"
"""
    loaded = modules_after(f"HEAVY = {HEAVY!r}\n{code}")
    assert "trimtab.cli" in loaded


@pytest.mark.quick
def test_a_mistake_on_the_command_line_is_told_before_anything_heavy_is_imported() -> None:
    code = "from trimtab.cli import main\nassert main(['lern']) == main(['tune', '--bogus']) == main([]) == 2"
    assert not modules_after(code) & HEAVY


@pytest.mark.quick
def test_tests_reach_loopback_and_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass
    # pytest-socket warns before it raises, and warnings are errors here.
    with pytest.raises((SocketConnectBlockedError, UserWarning), match=r"192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)  # an address reserved for documentation


@pytest.mark.quick
def test_the_tree_in_the_readme_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "tree.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.quick
def test_the_tree_lists_every_module_once_lowest_layer_first() -> None:
    tree = next(block for block in blocks(ROOT / "README.md", "text") if block.startswith("src/trimtab/"))
    listed = [line.split()[0] for line in tree.splitlines()[1:]]
    packages = [f"{path.parent.name}/" for path in SOURCES if path.name == "__init__.py" and path.parent != PACKAGE]
    modules = [path.name for path in SOURCES if path.name != "__init__.py" or path.parent == PACKAGE]
    assert sorted(listed) == sorted(packages + modules)
    ranked = [listed.index(name) for name in ("__init__.py", "errors.py", "types.py", "runtime.py", "learn.py", "cli/")]
    assert ranked == sorted(ranked)


@pytest.mark.quick
def test_the_version_is_the_same_everywhere() -> None:
    version = PYPROJECT["project"]["version"]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == version


@pytest.mark.quick
def test_optional_packages_are_the_extras_and_not_base_dependencies() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}

    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set().union(*(names(extra) for key, extra in extras.items() if key != "dev")) == OPTIONAL | DOCUMENTING
    assert names(extras["docs"]) == DOCUMENTING <= names(extras["dev"])
    assert not names(PYPROJECT["project"]["dependencies"]) & OPTIONAL


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in DOCUMENTS if blocks(path, "python")],
)
def test_readme_and_docs_blocks_run(document: Path, tmp_path: Path) -> None:
    # One process and one namespace per document, in order, as a reader who follows it would.
    program = "\n\n".join(blocks(document, "python"))
    environment = {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:__main__"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.quick
def test_commands_in_documents_use_verbs_and_options_that_exist() -> None:
    by_verb, _ = parsers()
    seen: set[Path] = set()
    for document in DOCUMENTS:
        lines = "\n".join(block.replace("\\\n", " ") for block in blocks(document, "sh", "console")).splitlines()
        for line in lines:
            if not re.match(r"(\$ )?trimtab [a-z]", line):
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            assert words[1] in by_verb, f"{document.name}: {words[1]} is no verb"
            used = {word.partition("=")[0] for word in words if word[:2] == "--"}
            unknown = used - set(by_verb[words[1]].long_options())
            assert not unknown, f"{document.name}: {sorted(unknown)} are no options of trimtab {words[1]}"
            seen.add(document)
    assert ROOT / "README.md" in seen


def test_the_five_minute_start_runs(tmp_path: Path) -> None:
    script = tmp_path / "bin" / "trimtab"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.join(trimtab_command())} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}
    commands = "\n".join(blocks(ROOT / "docs" / "start.md", "sh"))
    done = subprocess.run(
        ["sh", "-eu", "-c", commands], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 * 8 = 24. 24 - 15 = 9. The answer is 9." in done.stdout
