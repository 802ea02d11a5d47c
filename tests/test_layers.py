"""The shape of the source: imports point downward, and all of it stays within its budget."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sememe"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# The table of CONTRIBUTING.md: each may import its own line and those above.
ROWS = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
LEVEL = {part: level for level, row in enumerate(ROWS) for part in re.findall(r"`(\w+)/?`", row)}
LEVEL |= {"__init__": len(ROWS), "__main__": len(ROWS)}
HEAVY = {"torch", "transformers", "peft", "datasets"}
LIGHT = """errors figures paths storage reading keys options report terminal arguments serving
    cli_serve cli_benchmark cli_plan cli_tokenize"""
"""What starts without torch, so that `sememe --help` and `sememe report` are instant."""

# The size of src/sememe in nodes of its syntax tree, which line breaks do not change. Whoever adds
# a capability raises it in the same commit and says why.
# 93,000; concepts that see the tail they close, in every forward and cache 1,600; planners in
# several processes, and codes and plans that are drawn 600; heads that propose the next tokens
# 1,600; pruning, its scan and the cache front 2,800; concepts that a text goes on from, and bins in
# the table of other coders 600; the last normal tokens, in a ring of slots 300; codes
# that start as words and are read one by one 900; rows that come and go in the cache, and their
# steps, 4,800; the engine, which shares the steps of one model between requests, 5,500; its server,
# a third of which refuses, limits and ends requests, and the command 13,500;
# rows that wait where a measured cost says so, and choices that share a prompt, 1,500;
# planners and compressors that are served, as works one after another, their routes, and what of
# their requests is refused 4,100;
# servers under load, and batches out of phase, timed 4,700; several processes that serve,
# compress and evaluate, and go on where they were killed, 3,300; refusals that are read, and rows
# that are let go before a chunk, 140;
# checkpoints that two kills leave whole, damaged ones named and kept, the state of a run without
# pickles, every file under a hash and full disks in one sentence 1,900;
# steps that are left out, one command at a time in a folder, resuming that names what has changed,
# and processes that meet on the loopback 2,300;
# files from elsewhere, which are checked before they are used, and bases held to their first use,
# 2,580;
# a conversation's cache in a file, held to its model and to itself, 2,300; a shallow slice that
# stays exact in 16 bits 700; what a checkpoint holds checked as it is taken over, folders that need
# their own code told from damaged ones, full disks named by every command 570;
# tokens per second of the steps and their share of a GPU's arithmetic in the log 820; layers in
# several processes, whose scores are tracked together, 1,100;
# token shards, written by several processes and read block by block, 4,600; mixtures by weight
# 900; documents row by row, and figures over rows of different lengths, 1,700; conversations, of
# which answers are learned, 800; hidden units of the bridge and of a gap's map, and their fit, 700.
NODES = 169_200
FILE_LINES = 400
FUNCTION_LINES, LONGER_FUNCTIONS = 50, 5
PARAMETERS, FUNCTIONS_WITH_MORE = 8, 0

WORDS = """told said unsaid heard marked opened settled found made got asked given kept most least
reach allot turn price places columns ahead behind settling opening posterior meanings tiles case"""
"""What no name consists of: a noun from the field says what a thing is."""
NAMES_WITH_THEM = 0
ASYNCIO = {"connection_made"}  # its own name of what it calls


def module(path: Path) -> str:
    words = ("sememe", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


MODULES = {module(path): path for path in FILES}
NODES_OF = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree)]
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


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
        top, *rest = name.split(".")
        if top == "sememe" and rest:
            assert LEVEL[rest[0]] <= LEVEL[here], f"{here} imports {rest[0]}"
        assert top not in HEAVY or here not in LIGHT.split(), f"{here} imports {top}"
        assert top not in HEAVY - {"torch"} or here != "concepts", f"concepts import {top}"


def test_no_import_cycle():
    needs = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while free := {name for name, them in needs.items() if not them}:
        needs = {name: them - free for name, them in needs.items() if name not in free}
    assert not needs, "\n".join(f"{name} imports {sorted(them)}" for name, them in needs.items())


def test_functions_stay_small():
    functions = [(path.name, node) for path, node in NODES_OF if isinstance(node, FUNCTIONS)]
    long = [(file, f.name) for file, f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES]
    assert len(long) <= LONGER_FUNCTIONS, long
    wide = [
        (file, f.name)
        for file, f in functions
        if len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs) > PARAMETERS
    ]
    assert len(wide) <= FUNCTIONS_WITH_MORE, wide


def test_the_whole_stays_within_its_budget():
    nodes = Counter(part(path) for path, _ in NODES_OF)
    assert nodes.total() <= NODES, nodes


def test_names_are_words_of_the_field():
    names = {(path.name, path.stem) for path in FILES}
    for path, node in NODES_OF:
        if isinstance(node, FUNCTIONS | ast.ClassDef):
            names.add((path.name, node.name))
        elif isinstance(node, ast.arg):
            names.add((path.name, node.arg))
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add((path.name, getattr(node, "id", None) or node.attr))
    bad = set(WORDS.split())
    shapes = re.compile(r"_[A-Z0-9]+$")
    names = {name for name in names if name[1] not in ASYNCIO}
    wrong = sorted(name for name in names if bad & {*shapes.sub("", name[1]).lower().split("_")})
    assert len(wrong) <= NAMES_WITH_THEM, wrong


RUNS_CODE = re.compile(
    r"(^|\.)(pickle|marshal|dill|shelve|joblib|cloudpickle)\.\w+$|^torch\.load$|^(np|numpy)\.load$"
    r"|^(eval|exec|compile|__import__)$|^os\.(system|popen)$|^yaml\.(load|unsafe_load|full_load)$"
)
"""Calls that run what stands in a file."""
FROM_A_FOLDER = re.compile(r"\bAuto\w+\.from_(pretrained|config)$")


def test_nothing_that_is_read_is_run():
    """No pickle, no `eval`, no shell; no code from a model's folder, whatever a user answers; no
    template but those of the package, escaped."""
    for path, node in NODES_OF:
        if not isinstance(node, ast.Call):
            continue
        name, where = ast.unparse(node.func), f"{path}:{node.lineno}"
        words = {x.arg: ast.unparse(x.value) for x in node.keywords}
        assert not RUNS_CODE.search(name), f"{where} {name}"
        assert words.get("shell", "False") == words.get("trust_remote_code", "False") == "False"
        assert words.get("weights_only", "True") == "True", where
        if FROM_A_FOLDER.search(name):
            assert "trust_remote_code" in words, where
        if name.endswith("Environment") and "jinja2" in name:
            assert words["autoescape"] == "True" and "FileSystemLoader(HERE)" in words["loader"]


def test_text_files_are_utf_8_whatever_the_locale():
    for path, node in NODES_OF:
        name = getattr(getattr(node, "func", None), "attr", "")
        if name in ("read_text", "write_text", "open"):
            mode = node.args[0] if node.args else ast.Constant("r")
            is_binary = name == "open" and "b" in str(getattr(mode, "value", "b"))
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            assert named or is_binary, f"{path}:{node.lineno}: the locale's encoding"


def test_no_registry_host_and_no_machine_path_in_the_tree():
    hosts = r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs[.]org|download[.]pytorch[.]org"
    pattern = re.compile(f"{hosts}|/work[/]")
    suffixes = {".py", ".md", ".yaml", ".toml", ".html", ".css", ".sh", ""}
    folders = ("src", "tests", "docs", "recipes", "examples", "digest")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*paths, *ROOT.glob("*"), *ROOT.glob("runs/*.sh")]:
        if path.is_file() and path.suffix in suffixes and path.name != ".git":
            assert not pattern.search(path.read_text(errors="ignore")), path
