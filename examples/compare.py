"""Control, concepts at R=2 and R=4, and "skip the middle slice", on the same tokens: one table of held-out NLL.

    python examples/compare.py recipes/smollm2-135m-online-r4.yaml --out runs/compare [key=value …]

Every run resumes; finished ones are read, not repeated. Each is measured with its gate running free.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sememe.evaluation.files import evaluate_files
from sememe.training.recipe import load_recipe
from sememe.training.run import train

RUNS = {
    "control": ["system=control"], "skip": ["system=skip"], "concepts R=2": ["system=online", "rate=0.5"],
    "concepts R=4": ["system=online", "rate=0.25"],
}
SHOWN = {
    "nll": "NLL", "delta_nll_control": "Δ control", "compression_ratio": "R", "delta_nll_zero": "Δ zero",
    "delta_nll_shuffle": "Δ shuffle", "code_perplexity": "code ppl",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, help="folder of the four runs")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens to measure on")
    asked = parser.parse_intermixed_args()
    results = {}
    for name, changes in RUNS.items():
        run = asked.out / name.lower().replace(" ", "-").replace("=", "")
        recipe = load_recipe(asked.recipe, [*asked.overrides, *changes])
        train(recipe, run)
        control = None if name == "control" else str(asked.out / "control")
        results[name] = evaluate_files(str(run), recipe.data.heldout, asked.tokens, control)
    table = Table(title=f"held-out NLL after {recipe.steps * recipe.batch_size * recipe.sequence_length:,} tokens")
    for column in ("run", *SHOWN.values()):
        table.add_column(column)
    for name, result in results.items():
        table.add_row(name, *("–" if result[k] is None else f"{result[k]:.4g}" for k in SHOWN))
    Console().print(table)
    (asked.out / "compare.json").write_text(json.dumps({n: {k: r[k] for k in SHOWN} for n, r in results.items()}, indent=1))


if __name__ == "__main__":
    main()
