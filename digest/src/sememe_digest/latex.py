"""TeX as arXiv sends it, to text: titles, abstracts and names of the papers that are shown."""

import re

MARKUP = re.compile(r"[\\${}~^]|--|``|''")


def to_text(tex: str) -> str:
    """Text without TeX; what cannot be read stays as it is."""
    return "\n".join(_line(line) if MARKUP.search(line) else line for line in tex.split("\n"))


def _line(tex: str) -> str:
    from pylatexenc.latex2text import LatexNodes2Text

    # To TeX a bare % starts a comment that takes the rest of the line with it, and & is a tab; in
    # a feed they are what they look like, the first of them in one abstract of eight.
    escaped = re.sub(r"(?<!\\)[%&#]", r"\\\g<0>", tex)
    try:
        return " ".join(LatexNodes2Text(math_mode="text").latex_to_text(escaped).split())
    except Exception:  # IndexError and more on unbalanced input: raw text is better than none
        return tex


def authors(creator: str) -> list[dict[str, str]]:
    """Names and affiliations of a feed's one line, whose commas also stand inside parentheses."""
    people = []
    for part in re.findall(r"(?:\([^()]*(?:\([^()]*\)[^()]*)*\)|[^,])+", creator):
        name, _, affiliation = to_text(part).strip().removesuffix(")").partition(" (")
        # Collaborations come as `NVIDIA,  :, First Author`.
        if name.strip(" :"):
            people.append({"name": name, "affiliation": affiliation})
    return people
