"""TeX as arXiv sends it, to text: titles, abstracts and names of the papers that are shown."""

import re

from sememe_digest.papers import Author

MARKUP = re.compile(r"[\\${}~^]|--|``|''")


def to_text(tex: str) -> str:
    """Text without TeX; what cannot be read stays as it is."""
    if not MARKUP.search(tex):
        return tex
    return "\n".join(_line(line) for line in tex.split("\n"))


def _line(tex: str) -> str:
    from pylatexenc.latex2text import LatexNodes2Text

    # A bare % starts a comment in TeX and would take the rest of the line with it; in a feed it is
    # a percent sign, in one abstract of eight.
    escaped = re.sub(r"(?<!\\)%", r"\\%", tex)
    try:
        text = LatexNodes2Text(math_mode="text", strict_latex_spaces=False).latex_to_text(escaped)
    except Exception:  # IndexError and others on unbalanced input: the raw text is better than none
        return tex
    return " ".join(text.split())


def authors(creator: str) -> list[Author]:
    """Names and affiliations of a feed's one line, whose commas also stand inside parentheses."""
    parts, depth = [""], 0
    for character in creator:
        depth += (character == "(") - (character == ")")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    people = []
    for part in (to_text(part).strip() for part in parts):
        match = re.fullmatch(r"(.*?)\s*\((.*)\)", part, re.S)
        name, affiliation = match.groups() if match else (part, "")
        # Collaborations come as `NVIDIA,  :, First Author`.
        if name.strip(" :"):
            people.append(Author(name=name, affiliation=affiliation))
    return people
