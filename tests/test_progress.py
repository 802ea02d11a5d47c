"""Progress bars."""

from sememe import progress


def test_bars_write_lines_where_there_is_no_terminal(capsys):
    with progress.bar(total=1, desc="outside"), progress.bar(total=10, desc="work") as shown:
        shown.update(10)
    printed = capsys.readouterr().err
    shares = [line.split("%")[0] for line in printed.splitlines()]
    assert shares == ["outside:   0", "work:   0", "work: 100", "outside:   0"]
    assert not {"\r", "\x1b"} & set(printed)
