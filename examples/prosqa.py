"""Questions on a graph for a planner: made up, or taken from a ProsQA file. From the repository's
root:

python examples/prosqa.py prosqa --count 20000 --thought steps → prosqa/train.jsonl and
heldout.jsonl
python examples/prosqa.py easy --hops 2 2 --nodes 6 8 --even   small graphs, for a small model
python examples/prosqa.py real --convert prosqa_valid.json     → real/prosqa_valid.jsonl
"""

import argparse
import sys
from pathlib import Path

from sememe.errors import SememeError
from sememe.tasks.prosqa import generate, read_prosqa, write_jsonl


def main(asked: argparse.Namespace) -> None:
    if asked.convert:
        files = {asked.convert.stem: read_prosqa(asked.convert)}
    else:
        hops, nodes = tuple(asked.hops), tuple(asked.nodes)
        made = generate(
            asked.count + asked.heldout, asked.seed, hops, nodes, asked.even
        )  # all different
        files = {"train": made[: asked.count], "heldout": made[asked.count :]}
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, questions in files.items():
        write_jsonl(questions, asked.out / f"{name}.jsonl", asked.thought)
        print(
            f"{asked.out / name}.jsonl: {len(questions)} questions of fields instruction and "
            "response"
        )


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("out", type=Path, help="folder for the files; it is made")
for option, value, said in (
    ("count", 2000, "questions to train on"),
    ("heldout", 300, "other questions"),
    ("seed", 0, "of all"),
):
    parser.add_argument(f"--{option}", type=int, default=value, help=f"{said} (default {value})")
parser.add_argument(
    "--hops",
    type=int,
    nargs=2,
    default=(3, 6),
    help="least and most steps from person to answer (default 3 6)",
)
parser.add_argument(
    "--nodes",
    type=int,
    nargs=2,
    default=(17, 28),
    help="least and most nodes of a graph (default 17 28)",
)
parser.add_argument(
    "--even",
    action="store_true",
    help="the wrong answer is as many steps from the nearest other "
    "person: no shorter look tells, as it often does in small graphs",
)
parser.add_argument(
    "--thought",
    choices=("none", "steps", "reached"),
    default="none",
    help="what the response begins with: the "
    "steps to the answer, or all that a search reaches before it (default none)",
)
parser.add_argument(
    "--convert", type=Path, help="a ProsQA JSON file, instead of making questions up"
)
if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except SememeError as error:
        sys.exit(f"error: {error}")
