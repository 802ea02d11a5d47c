"""The shape of the source: imports point downward, nothing is larger than a reader can take in, and
the whole stays within its budget."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sememe"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Files and folders of src/sememe from the bottom up: each may import its own line and those above.
LAYERS = [
    line.split()
    for line in """
    errors detokenize progress figures
    paths storage keys options
    report
    concepts
    backbone data pairs
    models codes
    evaluation
    systems training sweep measure
    terminal generate
    __init__ __main__ arguments cli
    """.strip().splitlines()
]
LEVEL = {part: level for level, line in enumerate(LAYERS) for part in line}
HEAVY = {"torch", "transformers", "peft", "datasets"}
LIGHT = {
    "errors",
    "figures",
    "paths",
    "storage",
    "keys",
    "options",
    "report",
    "terminal",
    "arguments",
}
"""What starts without torch, so that `sememe --help` and `sememe report` are instant."""

# The size of src/sememe in nodes of its syntax tree, which line breaks do not change. Whoever adds
# a capability raises it in the same commit and says why.
NODES = 118_000
FILE_LINES = 425
FUNCTION_LINES, LONGER_FUNCTIONS = 50, 5
PARAMETERS, FUNCTIONS_WITH_MORE = 8, 1
"""The one is `forward` of the online model, whose parameters are those of transformers."""

WORDS = """told said unsaid heard marked opened settled found made got asked given kept most least
reach allot turn price places columns ahead behind settling opening posterior meanings tiles case"""
"""What no name consists of: a noun from the field says what a thing is."""
NAMES_WITH_THEM = 20


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    words = ("sememe", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


MODULES = {module(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere but for type checkers alone; `from sememe.a import b`
    is sememe.a.b where that is one."""
    names, waiting = set(), [TREES[path]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in deeper}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_is_small_and_imports_downward(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    here = part(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "sememe" and rest:
            there = rest.split(".")[0]
            assert LEVEL[there] <= LEVEL[here], f"{here} imports {there}"
        assert top not in HEAVY or here not in LIGHT, f"{here} imports {top}"
        assert top not in HEAVY - {"torch"} or here != "concepts", f"concepts import {top}"


def test_no_import_cycle():
    needs = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    # Takes away what imports nothing that is left, and what nothing that is left imports.
    while free := {
        n for n in needs if not needs[n] or not any(n in them for them in needs.values())
    }:
        needs = {name: them - free for name, them in needs.items() if name not in free}
    assert not needs, "\n".join(f"{name} imports {sorted(them)}" for name, them in needs.items())


def test_functions_stay_small():
    long, wide = [], []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}"
                long += [where] * (node.end_lineno - node.lineno >= FUNCTION_LINES)
                parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                wide += [where] * (len(parameters) > PARAMETERS)
    assert len(long) <= LONGER_FUNCTIONS, long
    assert len(wide) <= FUNCTIONS_WITH_MORE, wide


def test_the_whole_stays_within_its_budget():
    nodes = Counter({part(path): sum(1 for _ in ast.walk(tree)) for path, tree in TREES.items()})
    assert nodes.total() <= NODES, nodes


def test_names_are_words_of_the_field():
    names = {(path.name, path.stem) for path in FILES}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add((path.name, node.name))
            elif isinstance(node, ast.arg):
                names.add((path.name, node.arg))
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add((path.name, getattr(node, "id", None) or node.attr))
    bad = set(WORDS.split())
    wrong = sorted(name for name in names if bad & {*name[1].lower().split("_")})
    assert len(wrong) <= NAMES_WITH_THEM, wrong


def test_text_files_are_utf_8_whatever_the_locale():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            name = getattr(getattr(node, "func", None), "attr", "")
            if name not in ("read_text", "write_text", "open"):
                continue
            mode = node.args[0] if node.args else ast.Constant("r")
            is_text = name != "open" or "b" not in str(getattr(mode, "value", "b"))
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            assert named or not is_text, f"{path}:{node.lineno}: the locale's encoding"


def test_no_registry_host_and_no_machine_path_in_the_tree():
    hosts = r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs[.]org|download[.]pytorch[.]org"
    pattern = re.compile(f"{hosts}|/work[/]")
    suffixes = {".py", ".md", ".yaml", ".toml", ".html", ".css", ".sh", ""}
    folders = ("src", "tests", "docs", "recipes", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*paths, *ROOT.glob("*"), *ROOT.glob("runs/*.sh")]:
        if path.is_file() and path.suffix in suffixes and path.name != ".git":
            assert not pattern.search(path.read_text(errors="ignore")), path
