"""System 1 (online) on a Qwen base: recipe → run folder → figures. From the repository's root:

python examples/train_qwen_2.py [BASE] [RUN]
"""

import sys
from pathlib import Path

from sememe.errors import SememeError
from sememe.evaluation.results import CONTRACT
from sememe.keys import Data, Recipe
from sememe.measure import evaluate
from sememe.training.run import train


def main(base: str = "Qwen/Qwen3-0.6B", run: str = "runs/qwen-online") -> None:
    recipe = Recipe(
        system="online",
        base=base,
        data=Data(train="data/train.txt", heldout="data/heldout.txt"),
        steps=200,
        batch_size=4,
        rate=0.5,
        max_tail=8,
        split=None,  # 2/15 of the layers shallow, 2/15 deep, the rest in the middle
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
