"""System 2 (compressor) on a Qwen base: recipe → run folder → figures. From the repository's root:

python examples/train_qwen.py [BASE] [RUN]
"""

import sys
from pathlib import Path

from sememe.errors import SememeError
from sememe.evaluation.results import CONTRACT
from sememe.keys import Data, Recipe
from sememe.measure import evaluate
from sememe.training.run import train


def main(base: str = "Qwen/Qwen3-0.6B", run: str = "runs/qwen-compressor") -> None:
    recipe = Recipe(
        system="compressor",
        base=base,
        data=Data(train="data/train.txt", heldout="data/heldout.txt"),
        steps=400,
        sequence_length=64,
        batch_size=8,
        rate=0.5,
        boundary="fixed",
        depth=8,  # layers that read the text; all of them write it again
    )
    train(recipe, Path(run))  # the same call resumes; a finished run is left as it is
    figures = evaluate(run, recipe.data.heldout)
    for key in CONTRACT:
        print(f"{key:22} {figures[key]}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SememeError as error:
        sys.exit(f"error: {error}")
