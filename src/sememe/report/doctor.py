"""A run → what is wrong with it, by which figures, and what to try: RULES, one by one.

docs/doctor.md is made of the same table: `python -m sememe.report.doctor > docs/doctor.md`."""

from typing import Any

from sememe.figures import markdown
from sememe.report.files import Run, of_run
from sememe.report.log import Log, Unmeasured
from sememe.report.rules import EVERY, RULES

INTRODUCTION = """# How to read a run

`sememe doctor RUN` reads `recipe.yaml`, `metrics.jsonl` and, where it is there, `evaluate.json`. It
goes through the rules below and says which found something, by which figures, and what to try: each
override on its own. It names as well the rules that found nothing, and those that could not look
because the run has not measured what they need. Exit code 0: nothing found; 1: something found. An
unfinished run may be examined too. What each figure is and how it looks in a healthy run:
[figures.md](figures.md).

The *final stage* is every line of the log once quantise is at its end; of a planner,
every line after its warm-up. *early* and *late* are the first and last third, by their medians.
`KEY*2` in the last column is twice what the run had.

The limits stand between tiny runs made sick in each of these ways and healthy runs of tiny bases
and of a 15M one: expect to move them. A finding is a place to look, not a proof: text that cannot
be predicted gives flat losses and idle codes whatever the settings are, and one fault brings others
with it (a gate that is shut starves the codes). Change one thing at a time.

"""


def examine(run: Run) -> dict[str, Any]:
    """What every rule for its system says of a run."""
    log = Log(run)
    findings, passed, unchecked = [], [], []
    for rule in RULES:
        if run.system not in rule.systems:
            continue
        log.evidence = {}
        try:
            with of_run(run.path):
                is_sick = rule.is_sick(log)
        except Unmeasured as missing:
            unchecked.append({"rule": rule.name, "because": str(missing)})
            continue
        if not is_sick:
            passed.append(rule.name)
            continue
        findings.append(
            {
                "rule": rule.name,
                "sign": rule.sign,
                "evidence": log.evidence,
                "advice": rule.advice,
                "try": [x for text in rule.tries if (x := log.override(text))],
            }
        )
    return {
        "run": str(run.path),
        "system": run.system,
        "step": run.lines[-1]["step"],
        "healthy": not findings,
        "findings": findings,
        "passed": passed,
        "unchecked": unchecked,
    }


def document() -> str:
    """docs/doctor.md."""
    cells = [
        (
            rule.name,
            "every system" if rule.systems == EVERY else ", ".join(rule.systems),
            rule.sign,
            rule.advice,
            ", ".join(f"`{text}`" for text in rule.tries),
        )
        for rule in RULES
    ]
    return INTRODUCTION + markdown(["rule", "of", "sign", "meaning", "to try"], cells)


if __name__ == "__main__":
    print(document(), end="")
