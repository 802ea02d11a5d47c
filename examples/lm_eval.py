"""lm-eval, unmodified, on any MODEL of this package and on bases. From the repository's root:

pip install -e '.[lm-eval]'
python examples/lm_eval.py MODEL [MODEL…] [--tasks NAMES] [--limit N]
"""

import argparse
import sys

sys.path.pop(0)  # this folder: `import lm_eval` is to find the harness, not this file

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from sememe.errors import SememeError
from sememe.models.loading import load_model


def main(models: list[str], tasks: list[str], limit: int | None) -> None:
    manager = TaskManager(include_path="examples/tasks")
    for name in models:
        # A run folder, a saved model, the reference model, or a base.
        model, tokenizer = load_model(name)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")
        results = simple_evaluate(wrapped, tasks=tasks, limit=limit, task_manager=manager)
        print(f"{name}\n{make_table(results)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tasks", default="thursday_next,thursday_perplexity")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    try:
        main(options.models, options.tasks.split(","), options.limit)
    except SememeError as error:
        sys.exit(f"error: {error}")
