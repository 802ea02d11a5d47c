"""System 3 (planner and executor) on a Qwen base: recipe → run folder → figures. From the
repository's root:

python examples/train_qwen_3.py [BASE] [RUN]"""

import sys
from pathlib import Path

from sememe.errors import SememeError
from sememe.keys import Data, Em, Plan, Recipe
from sememe.measure import Options, evaluate
from sememe.training.run import train


def main(base: str = "Qwen/Qwen3-0.6B", run: str = "runs/qwen-planner") -> None:
    recipe = Recipe(
        system="planner",
        base=base,
        data=Data(
            train="data/train.txt", heldout="data/heldout.txt", source_share=0.25
        ),  # or fields of a .jsonl
        steps=400,
        batch_size=8,
        source_length=32,
        target_length=96,
        plan=Plan(sizes=[64, 512], lengths=[2, 8]),  # two types: ids of each, and concepts at most
        em=Em(every=40, stages=(0.2, 0.4)),
    )
    train(recipe, Path(run))  # the same call resumes; a finished run is left as it is
    options = Options(tokens=2048, search=3)
    for line in evaluate(run, recipe.data.heldout, options=options)["given"]:
        print(f"{line['given']:12} {line['nll']:.4f}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SememeError as error:
        sys.exit(f"error: {error}")
