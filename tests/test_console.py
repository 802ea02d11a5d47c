"""What is printed: text and paths as they are, on any terminal, and JSON ahead of it."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import byte_tokenizer
from sememe import cli, progress, terminal
from sememe.errors import SememeError

ODD = "a:b:c :key: [bold]b[/bold] [/x] \x1b[31m\t|\a\x0b end"


def test_text_is_printed_as_it_is_and_styles_stand_around_it(monkeypatch):
    file = io.StringIO()
    options = {"force_terminal": True, "color_system": "standard", "no_color": False}
    monkeypatch.setattr(terminal, "out", terminal.new_console(file=file, **options))
    terminal.write(ODD * 40, "red")
    terminal.say(ODD)
    assert file.getvalue() == f"\x1b[31m{ODD * 40}\x1b[0m{ODD}\n"


def test_tables_and_diagnoses_take_no_markup(capsys):
    terminal.table([("out[/b]", "[red]:key:")], "runs/run[v2]", ("[bold]measure", "value"))
    printed = capsys.readouterr().out
    assert all(x in printed for x in ("out[/b]", "[red]:key:", "runs/run[v2]", "[bold]measure"))
    unchecked = [{"rule": "a", "because": "[/c]"}]
    diagnosis = {"run": "run[/v2]", "step": 3, "passed": ["[b]"], "unchecked": unchecked}
    finding = {"rule": "x", "advice": "[/a]", "sign": "s", "evidence": {"k": 0.5}, "try": ["[/b]"]}
    shown = "1 findings at step 3\n\nX: [/a]\n  s, k 0.5\n  try one of: [/b]\n"
    for findings, want in (([], "healthy at step 3\n"), ([finding], shown)):
        terminal.show_diagnosis(diagnosis | {"findings": findings})
        rest = "\nnothing found by: [b]\nnot checked: a ([/c])\n"
        assert capsys.readouterr().out == f"run[/v2]: {want}{rest}"


def streamed(monkeypatch, text: str, read: list[int] | None, extra: tuple[int, ...] = ()) -> str:
    """What is printed of a prompt and a text that comes token by token; each step has the concepts
    of the tokens before it in `read`: -2 the sink, -1 none."""
    tokenizer, out, prompt = byte_tokenizer(), io.StringIO(), "日 :key:\t["
    monkeypatch.setattr(terminal, "out", terminal.new_console(file=out, width=40))
    ids = tokenizer(prompt).input_ids
    cache = SimpleNamespace(concept_ids=torch.zeros(1, 0))
    streamer = terminal.ConceptStreamer(tokenizer, prompt, None if read is None else cache)
    streamer.put(torch.tensor([ids]))
    for count, token in enumerate([*tokenizer(text).input_ids, *extra]):
        cache.concept_ids = torch.tensor([(read or [])[: len(ids) + count]])
        streamer.put(torch.tensor([token]))
    streamer.end()
    return out.getvalue()


def test_a_stream_is_the_text_to_its_end(monkeypatch):
    text = ODD + " déjà 🙂" * 20
    assert streamed(monkeypatch, text, None) == f"日 :key:\t[{text}\n"
    half = byte_tokenizer().convert_tokens_to_ids("ð")
    assert streamed(monkeypatch, "ok", None, (half,)) == "日 :key:\t[ok\N{REPLACEMENT CHARACTER}\n"


def test_segments_are_whole_characters(monkeypatch):
    """The prompt has 11 bytes; concepts are written inside of characters, too."""
    read = [-2, 5, -1, -1, 6, *[-1] * 6, -1, 7, -1, 8, 9, -1, -1, -1, -1]
    assert streamed(monkeypatch, "é🙂x", read) == "⟨sink⟩⟨5⟩日 :⟨6⟩key:\t[é⟨7⟩⟨8⟩⟨9⟩🙂x\n"


@pytest.mark.parametrize(("encoding", "printed"), [("cp1252", "?3? é\n"), ("utf-8", "⟨3⟩ é\n")])
def test_what_a_terminal_has_not_is_replaced(monkeypatch, encoding, printed):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["sememe", "doctor", "run"])
    monkeypatch.setattr(cli, "app", lambda: terminal.say("⟨3⟩ é"))
    cli.main()
    sys.stdout.flush()
    assert raw.getvalue().decode(encoding).replace("\r\n", "\n") == printed


def test_json_is_written_before_figures_are_printed_and_figures_without_it(tmp_path, monkeypatch):
    """A terminal that goes away must not cost the figures, nor a full disk what is printed."""
    file, printed = tmp_path / "x.json", []

    def doctored():
        yield [1]
        printed.append(file.exists())
        "⟨".encode("latin-1")

    monkeypatch.setattr(cli.app, "registered_commands", [])
    run = cli.command(doctored)
    with pytest.raises(UnicodeEncodeError):
        run(json_file=file)
    assert printed == [True] and json.loads(file.read_text()) == [1]
    with pytest.raises((SememeError, UnicodeEncodeError)):
        run(json_file=tmp_path / "gone" / "x.json")
    assert len(printed) == 2


def test_bars_write_lines_where_there_is_no_terminal(capsys):
    with progress.bar(total=1, desc="outside"), progress.bar(total=10, desc="work") as shown:
        shown.update(10)
    printed = capsys.readouterr().err
    shares = [line.split("%")[0] for line in printed.splitlines()]
    assert shares == ["outside:   0", "work:   0", "work: 100", "outside:   0"]
    assert not {"\r", "\x1b"} & set(printed)
