"""What a user names is a path that is there, one that may be made, or none at all; never a
traceback."""

import os

import pytest

from sememe.errors import SememeError
from sememe.paths import existing, shown, usable

NO_PATHS = ("once upon a time " * 30, "x" * 300, "nul\0", "~nobody-of-that-name/x")


@pytest.mark.parametrize("name", NO_PATHS)
def test_what_can_be_no_path(name):
    assert existing(name) is None
    with pytest.raises(SememeError, match=r"cannot be used as a path .*need .*try: "):
        usable(name)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").write_text("")
    assert existing("~/here") == usable("~/here") == tmp_path / "here"
    for name in ("not", "not/there", "here/below"):
        assert existing(tmp_path / name) is None and usable(f"~/{name}") == tmp_path / name


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_what_may_not_be_looked_at_is_not_missing(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(SememeError, match="Permission denied"):
        existing(tmp_path / "closed" / "x")


def test_a_long_name_is_shown_in_part():
    assert shown("a" * 80) == "a" * 80 and shown("a" * 81) == "a" * 80 + "… (81 characters)"
