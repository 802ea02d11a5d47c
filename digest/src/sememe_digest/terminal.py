"""What a run and `why` print: counts of each class, faults, and the reasons for one paper."""

import sys
from pathlib import Path

from sememe_digest.archive import Archive
from sememe_digest.errors import DigestError
from sememe_digest.papers import Day


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show(day: Day | None, code: int, site: Path) -> None:
    """Counts of every class, what is missing, and the page; nothing more on a day without one."""
    if day is None:
        print("nothing announced, as on weekends and holidays: nothing was touched")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("class", *("announced new matching shown summarised".split()), title=day.date)
    for category, counts in day.counts.items():
        table.add_row(category, *map(str, counts.model_dump().values()))
    Console().print(table)
    for line in faults(day):
        print(line)
    if code == 4:
        print("incomplete: run the same command again later")
    print(f"page: {site / 'index.html'}")


def faults(day: Day) -> list[str]:
    """Every feed that was not as it should be, and every summary that is missing."""
    notes = [feed.note for feed in day.feeds if feed.note] + day.notes
    return notes + [f"{entry.id}: {entry.failure}" for entry in day.entries if entry.failure]


def why(archive: Archive, identifier: str) -> None:
    """What the archive knows of a paper: its rank and hits, or what kept it out."""
    name = identifier.rpartition("/abs/")[2].removeprefix("arXiv:").strip()
    name = name.rpartition("v")[0] if name.rpartition("v")[2].isdigit() and "v" in name else name
    day = next((day for day in archive.days.values() if name in day.announced), None)
    if day is None:
        need = "need a paper that a monitored class announced. try: its id, as 2602.05191"
        raise DigestError(f"{identifier} is in no day of {archive.site}: {need}")
    verdict = day.announced[name]
    print(f"{name} was announced in {verdict.category} and is in the record of {day.date}.")
    entry = next((entry for entry in day.entries if entry.id == name), None)
    for hit in entry.hits if entry else []:
        place = "title, once and a half" if hit.in_title else "abstract"
        print(f"  {hit.term}: {hit.weight:g} ({place})")
    if entry:
        near = "" if entry.similarity is None else f", nearness to interests {entry.similarity:.3f}"
        print(f"Shown at rank {entry.rank}, score {entry.score:g}{near}.")
    elif verdict.excluded:
        print(f"Not shown: excluded by “{verdict.excluded}”.")
    else:
        terms = ", ".join(verdict.terms) or "no term"
        cut = "no paper was shown" if day.cut_score is None else f"the last shown {day.cut_score:g}"
        print(f"Not shown: score {verdict.score:g} ({terms}); {cut}.")
