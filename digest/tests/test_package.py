"""The package as a whole: its layers and size, its speed, the workflow that users copy."""

import ast
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import yaml

from sememe_digest.config import Config, read_config
from tests.stub import DATA, feed_xml, write_config

DIGEST = Path(__file__).parents[1]
SOURCE = DIGEST / "src" / "sememe_digest"
FILES = sorted(SOURCE.glob("*.py"))
# From the bottom up: each file imports those before it alone.
LAYERS = ["__init__", "papers", "client", "config", "feeds", "ranking", "fulltext"]
LAYERS += ["numbers", "summaries", "render"]
LAYERS += ["daily", "cli"]
LIBRARIES = {"httpx", "pydantic", "yaml", "jinja2", "markupsafe", "typer"}
LIBRARIES |= {"markdown_it", "pypdf", "pylatexenc", "nh3"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_imports_point_downward():
    assert {path.stem for path in FILES} == set(LAYERS)
    for path in FILES:
        own = {n.split(".")[1] for n in imported(path) if n.startswith("sememe_digest.")}
        below = LAYERS[: LAYERS.index(path.stem)]
        assert own & set(LAYERS) <= set(below), path.stem
        others = {name.split(".")[0] for name in imported(path)} - {"sememe_digest"}
        assert others - sys.stdlib_module_names <= LIBRARIES, path.stem


def test_size_stays_within_its_budget():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lines.values()) <= 150, lines
    # Blank lines and docstrings count.
    assert sum(lines.values()) <= 1200, lines


def test_examples_are_configurations():
    for path in (DIGEST / "examples").glob("*.yaml"):
        assert read_config(path).categories
    assert read_config(DIGEST / "examples" / "concept-tokens.yaml").interests
    assert json.loads((DIGEST / "examples" / "vercel.json").read_text()) == {
        "outputDirectory": "site"
    }


def test_every_key_is_explained_where_init_writes_it():
    text = (SOURCE / "templates" / "digest.yaml").read_text(encoding="utf-8")
    keys = set(Config.model_fields) - {"feeds_url", "pages_url"}
    assert {key for key in keys if not re.search(rf"\b{key}\b", text)} == set()


def test_readme_names_what_there_is():
    text = (DIGEST / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DIGEST / name).exists(), name
    help_text = subprocess.check_output(
        [sys.executable, "-c", "from sememe_digest.cli import main; main()", "--help"], text=True
    )
    for command in re.findall(r"^sememe-digest (\w+)", text, re.M):
        assert command in help_text
    assert "40 5,8,12 * * 1-5" in text
    assert "40 5,8,12 * * 1-5" in (DIGEST / "examples" / "digest.yml").read_text(encoding="utf-8")


def test_the_workflow_commits_once(tmp_path):
    """Its `run:` blocks in a repository of its own, with feeds from a folder."""
    workflow = yaml.safe_load((DIGEST / "examples" / "digest.yml").read_text(encoding="utf-8"))
    blocks = [step["run"] for step in workflow["jobs"]["digest"]["steps"] if "run" in step]
    assert len(blocks) == 2 and workflow["concurrency"]
    write_config(tmp_path, categories=["cs.LG"])
    feeds = tmp_path.parent / f"{tmp_path.name}-feeds"
    feeds.mkdir()
    (feeds / "cs.LG.xml").write_bytes(feed_xml([{"id": "2602.00001"}]))
    bin_folder = feeds / "bin"
    bin_folder.mkdir()
    program = bin_folder / "sememe-digest"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from sememe_digest.cli import main; '
        f'main()" "$@" --feeds {feeds}\n'
    )
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=tmp_path, text=True)

    def job() -> int:
        for block in blocks:
            code = subprocess.run(
                ["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True
            ).returncode
            if code:
                return code
        return 0

    git("init", "--quiet")
    assert job() == 0 and git("log", "--oneline").count("\n") == 1
    assert git("ls-tree", "-r", "--name-only", "HEAD").splitlines()[0].startswith("site/")
    assert job() == 0 and git("log", "--oneline").count("\n") == 1
    write_config(tmp_path, categories=["cs.LG", "cs.AI"])
    # One class is missing: what there is is committed, and the job fails so that it is seen.
    assert job() == 4 and git("log", "--oneline").count("\n") == 2
    for name in ("cs.LG", "cs.AI"):
        (feeds / f"{name}.xml").write_bytes(feed_xml([], "Sat, 21 Feb 2026"))
    assert job() == 0 and git("log", "--oneline").count("\n") == 2


def test_two_thousand_items_take_little(tmp_path):
    abstract = "We train models for efficient inference and attention, 12.5% better. " * 20
    names = ("cs.AI", "cs.CL", "cs.DC", "cs.LG")
    for index, name in enumerate(names):
        items = [
            {"id": f"2602.{index}{n:04}", "title": f"Training {n}", "abstract": abstract}
            for n in range(500)
        ]
        (tmp_path / f"{name}.xml").write_bytes(feed_xml(items, category=name))
    seed = DATA.parent.parent / "examples" / "seed.yaml"
    command = [sys.executable, "-c", "from sememe_digest.cli import main; main()"]
    spent = []
    for number in range(3):
        words = ["run", "-c", seed, "--feeds", tmp_path, "--no-summaries", "--out"]
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, *words, tmp_path / str(number)], check=True, capture_output=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what the wall clock shows is also the work of others on the machine.
        spent.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    assert median(spent) < 2, spent
    # Not ru_maxrss, which a process inherits from the one that started it.
    script = (
        "import re, sys; from sememe_digest.cli import main\n"
        "try: main()\n"
        "finally: print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], "
        "file=sys.stderr)"
    )
    words = ["run", "-c", seed, "--feeds", tmp_path, "--no-summaries", "--out", tmp_path / "memory"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert int(done.stderr.split()[-1]) < 200 * 1024
