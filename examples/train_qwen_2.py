"""Online concepts as the note has them (recipes/literal/v2.yaml), on a Qwen base:

python examples/train_qwen_2.py [BASE] [key=value …] [--out RUN] [--tiny]"""

from qwen import main

if __name__ == "__main__":
    main("v2")
