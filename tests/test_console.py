"""What is printed: text and paths as they are, on any terminal, and JSON ahead of it."""

import ast
import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import byte_tokenizer
from sememe import cli, console, show, tables
from test_layers import FILES, SOURCE

ODD = "a:b:c :key: [bold]b[/bold] [/x] \x1b[31m\t|\a\x0b end"


@pytest.mark.parametrize("style", ["", "red"])
def test_text_is_printed_as_it_is(capsys, style):
    console.write(ODD * 40, style)
    console.say(ODD, style)
    assert capsys.readouterr().out == ODD * 40 + ODD + "\n"


def test_styles_stand_around_the_text():
    out = io.StringIO()
    console.write(
        ODD,
        "red",
        console.new_console(file=out, force_terminal=True, color_system="standard", no_color=False),
    )
    assert out.getvalue() == f"\x1b[31m{ODD}\x1b[0m"


def test_tables_take_no_markup(capsys):
    tables.table([("out[/b]", "[red]:key:")], "runs/run[v2]", ("[bold]measure", "value"))
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("out[/b]", "[red]:key:", "runs/run[v2]", "[bold]measure")
    )


def test_diagnosis_takes_no_markup(capsys):
    clean = {
        "run": "run[/v2]",
        "step": 3,
        "findings": [],
        "passed": ["[b]"],
        "unchecked": [{"rule": "a", "because": "[/c]"}],
    }
    tables.show_diagnosis(clean)
    assert (
        capsys.readouterr().out
        == "run[/v2] is healthy at step 3\nnothing found by: [b]\nnot checked: a ([/c])\n"
    )
    one = {
        "rule": "x",
        "advice": "[/a]",
        "sign": "s",
        "evidence": {},
        "step": 1,
        "try": ["data=[/b]"],
    }
    tables.show_diagnosis(clean | {"findings": [one]})
    assert "data=[/b]" in capsys.readouterr().out


class Cache:
    """The concept of each token that was read: -2 the sink, -1 none."""

    def __init__(self):
        self.concept_ids = torch.tensor([[]], dtype=torch.long)


def streamed(text: str, read: list[int] | None, extra: tuple[int, ...] = ()) -> str:
    """What is printed of a prompt and a text that comes token by token; each step has read what
    came before."""
    tokenizer = byte_tokenizer()
    out = io.StringIO()
    cache = None if read is None else Cache()
    prompt = "日 :key:\t["
    ids = tokenizer(prompt).input_ids
    streamer = show.ConceptStreamer(
        tokenizer, console.new_console(file=out, width=40), prompt, cache
    )
    streamer.put(torch.tensor([ids]))
    for count, token in enumerate([*tokenizer(text).input_ids, *extra]):
        if read is not None:
            cache.concept_ids = torch.tensor([read[: len(ids) + count]])
        streamer.put(torch.tensor([token]))
    streamer.end()
    return out.getvalue()


def test_a_stream_is_the_text_to_its_end():
    assert streamed(ODD + " déjà 🙂" * 20, None) == "日 :key:\t[" + ODD + " déjà 🙂" * 20 + "\n"
    half = byte_tokenizer().convert_tokens_to_ids("ð")
    assert streamed("ok", None, extra=(half,)) == "日 :key:\t[ok\N{REPLACEMENT CHARACTER}\n"


def test_segments_are_whole_characters():
    """The prompt has 11 bytes; concepts are written inside of characters, too."""
    read = [-2, 5, -1, -1, 6, *[-1] * 6, -1, 7, -1, 8, 9, -1, -1, -1, -1]
    assert streamed("é🙂x", read) == "⟨sink⟩⟨5⟩日 :⟨6⟩key:\t[é⟨7⟩⟨8⟩⟨9⟩🙂x\n"


def planner(text: str) -> SimpleNamespace:
    """Writes the same text from any plan."""
    shape = SimpleNamespace(slots=1, types=1, pack=torch.tensor, unpack=lambda plan: plan.tolist())
    config = SimpleNamespace(
        plan_shape=shape, get_text_config=lambda: SimpleNamespace(max_position_embeddings=99)
    )
    return SimpleNamespace(
        device="cpu",
        config=config,
        plan=lambda *ids, **options: (torch.tensor([[[[3]]]]), None),
        write=lambda *plans, **options: torch.tensor([byte_tokenizer()(text).input_ids]),
    )


def test_text_of_a_planner_is_printed_as_it_is(capsys):
    from sememe.show_plan import write_planned

    made = write_planned(planner(ODD), byte_tokenizer(), "why?", 8, 0.0, 0, True, [], console.out)
    assert capsys.readouterr().out == f"type 0 ⟨3⟩\n{ODD}\n" and made["text"] == ODD


@pytest.mark.parametrize(("encoding", "printed"), [("cp1252", "?3? é\n"), ("utf-8", "⟨3⟩ é\n")])
def test_what_a_terminal_has_not_is_replaced(monkeypatch, encoding, printed):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["sememe", "doctor", "run"])
    monkeypatch.setattr(cli, "app", lambda: console.say("⟨3⟩ é"))
    cli.main()
    sys.stdout.flush()
    assert raw.getvalue().decode(encoding).replace("\r\n", "\n") == printed


MARKUP = re.compile(
    r"\[/?(bold|dim|italic|underline|reverse|red|green|yellow|blue|magenta|cyan|link)\b[^\]]*\]|\[/\]"
)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name != "console.py"],
    ids=lambda p: str(p.relative_to(SOURCE)),
)
def test_nothing_is_printed_elsewhere(path):
    """rich's own console and print take `[b]` for markup; click's echo drops control characters in
    pipes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            assert name not in {
                "Console",
                "Progress",
                "track",
                "get_console",
                "from_markup",
                "echo",
                "secho",
            } or (name == "track" and ast.unparse(node.func) == "gate.track"), (
                f"{path}:{node.lineno}: {name}"
            )
            options = {word.arg for word in node.keywords}
            assert not options & {"markup", "emoji", "highlight"}, (
                f"{path}:{node.lineno}: set in console.py"
            )
            if name == "print" and isinstance(node.func, ast.Name):
                assert "file" in options, f"{path}:{node.lineno}: print"
        if isinstance(node, ast.ImportFrom) and node.module == "rich":
            assert not {alias.name for alias in node.names} & {"print", "get_console"}, path
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not MARKUP.search(node.value), f"{path}:{node.lineno}: markup"


@pytest.mark.parametrize("name", ["cli", "cli_benchmark", "cli_compressor"])
def test_json_is_written_before_figures_are_printed(name):
    """A terminal that goes away must not cost the figures."""
    seen = 0
    for function in ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8")).body:
        calls = [
            (node.lineno, ast.unparse(node.func))
            for node in ast.walk(function)
            if isinstance(node, ast.Call)
        ]
        json = [line for line, called in calls if called == "write_json"]
        shown = [line for line, called in calls if re.match(r"show\b|show_|table$|\(show", called)]
        assert not json or not shown or min(json) <= min(shown), (
            function.name
        )  # or within it, as its `show`
        seen += bool(json and shown)
    assert seen
