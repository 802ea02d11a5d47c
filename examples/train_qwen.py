"""Compressor and decompressor as the note has them (recipes/literal/v1.yaml), on a Qwen base:

python examples/train_qwen.py [BASE] [key=value …] [--out RUN] [--tiny]"""

from qwen import main

if __name__ == "__main__":
    main("v1")
