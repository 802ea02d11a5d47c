"""Progress bars."""

from sememe import progress


def test_bars_write_lines_where_there_is_no_terminal(capsys, monkeypatch):
    with (
        progress.bar(total=1, desc="outside"),
        progress.bar(total=10, desc="work", unit="part") as shown,
    ):
        shown.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0] for line in lines] == [
        "outside:   0",
        "work:   0",
        "work: 100",
        "outside:   0",
    ]
    assert not {"\r", "\x1b"} & set("".join(lines))
