"""Imports point downward, and no file grows without a reason."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sememe"
# Each part may import itself and what is listed. `report` reads files only.
ALLOWED = {
    "errors": set(),
    "console": set(),
    "detokenize": set(),
    "figures": set(),
    "storage": {"errors"},
    "progress": set(),
    "paths": {"errors"},
    "concepts": {"errors"},
    "backbone": {"concepts", "paths", "storage", "errors"},
    "data": {"paths", "errors"},
    "pairs": {"data", "paths", "errors"},
    "models": {"concepts", "backbone", "pairs", "paths", "storage", "errors"},
    "evaluation": {
        "models",
        "concepts",
        "backbone",
        "data",
        "pairs",
        "detokenize",
        "paths",
        "errors",
        "storage",
        "progress",
    },
    "systems": {
        "training",
        "evaluation",
        "models",
        "concepts",
        "data",
        "pairs",
        "errors",
    },
    "training": {
        "systems",
        "storage",
        "progress",
        "evaluation",
        "models",
        "concepts",
        "backbone",
        "data",
        "pairs",
        "paths",
        "errors",
    },
    "report": {"figures", "paths", "errors", "storage"},
    "codes": {"models", "data", "paths", "errors", "storage", "progress"},
    "show": {"models", "data", "show_plan", "console", "detokenize", "errors", "figures"},
    "show_plan": {"show", "console", "detokenize", "errors"},
    "tables": {"console", "errors", "evaluation", "figures"},
    "options": {"errors", "storage"},
    "cli_compressor": {"options", "tables", "console", "codes", "evaluation"},
    "cli_benchmark": {"options", "tables", "console", "errors", "evaluation", "report"},
    "cli": {
        "options",
        "cli_benchmark",
        "cli_compressor",
        "tables",
        "console",
        "errors",
        "backbone",
        "models",
        "training",
        "evaluation",
        "report",
        "show",
    },
    "__init__": {"models", "codes"},
    "__main__": {"cli"},
}
HEAVY = {
    "concepts": {"transformers", "peft", "datasets"},
    "report": {"torch", "transformers", "peft"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "sememe"
                else {node.module}
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downward(path):
    here = part(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "sememe" and rest:
            there = rest.split(".")[0]
            assert there == here or there in ALLOWED[here], f"{here} imports {there}"
        assert top not in HEAVY.get(here, set()), f"{here} imports {top}"


def test_systems_do_not_import_each_other():
    systems = {"sememe.models.online", "sememe.models.control"}
    for name in systems:
        path = SOURCE / Path(*name.split(".")[1:]).with_suffix(".py")
        assert not imports(path) & (systems - {name})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 520


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_text_files_are_utf_8_whatever_the_locale(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            mode = (
                node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            )
            text = node.func.attr in ("read_text", "write_text") or (
                node.func.attr == "open" and (not node.args or mode) and "b" not in mode
            )
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            assert named or not text, (
                f"{path}:{node.lineno} reads or writes text in the locale's encoding"
            )


def test_no_registry_host_and_no_machine_path_in_the_tree():
    words = (
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "registry.npmjs" + ".org",
        "/work" + "/",
        "download.pytorch" + ".org",
    )
    root = SOURCE.parents[1]
    for folder in ("src", "tests", "docs", "recipes", "examples", "."):
        for path in (root / folder).glob("**/*" if folder != "." else "*"):
            if (
                path.is_file()
                and path.suffix in {".py", ".md", ".yaml", ".toml", ".html", ".css", ""}
                and path.name != ".git"
            ):
                text = path.read_text(errors="ignore")
                assert not [w for w in words if w in text], path
