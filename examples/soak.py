"""A run of training that is killed, told to stop, given a full disk or a flipped bit, again and
again, must end as one that nobody touched: the same losses, bit for bit, and the same weights.
Whatever stops on the way says why in one sentence.

python examples/soak.py                      # an hour
python examples/soak.py --minutes 5 --seed 7

It trains a tiny base with random weights. One line of JSON for each fault; exit code 1 where one
was not survived. POSIX alone: a full disk is a limit on the size of files.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from serve_setup import tiny_base

from sememe.storage import sha256

FAULTS = ("kill", "kill", "stop", "full", "flip")
LONGEST = 60  # seconds that a process is left alone
CODES = {"kill": (-signal.SIGKILL,), "stop": (0,), "full": (0, 1), "flip": (0, 1, 2), "none": (0,)}
"""Exit codes that are right after a fault; 0 also where training was over first."""
RECIPE = """
system: online
base: {base}
data: {{train: {train}, heldout: {heldout}}}
steps: {steps}
sequence_length: 64
batch_size: 2
rate: 0.5
split: [1, 2, 1]
lora: {{rank: 4}}
save_every: 20
heldout_every: 100
"""


class Soak:
    def __init__(self, options: argparse.Namespace, work: Path):
        self.draw = random.Random(options.seed)
        self.work, self.recipe = work, work / "recipe.yaml"
        data = Path(__file__).parents[1] / "data"
        values = {"base": tiny_base(work / "base", options.tokenizer), "steps": options.steps}
        values |= {"train": data / "train.txt", "heldout": data / "heldout.txt"}
        self.recipe.write_text(RECIPE.format(**values), "utf-8")
        self.untouched = work / "untouched"
        start = time.monotonic()
        if self.wait(self.start(self.untouched), None) != 0:
            sys.exit((work / "untouched.log").read_text("utf-8"))
        self.seconds = time.monotonic() - start

    # ---- one process ----

    def start(self, run: Path, file_bytes: int | None = None) -> subprocess.Popen:
        """Of which every file may have so many bytes."""

        def limit() -> None:
            if file_bytes is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        command = [sys.executable, "-m", "sememe", "train", str(self.recipe), "--out", str(run)]
        # Through a pipe: a log is a file, too, and the limit would count for it.
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=limit
        )

    def wait(self, process: subprocess.Popen, seconds: float | None, number: int = 0) -> int:
        """Its exit code; after so many seconds it gets that signal."""
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            said, _ = process.communicate(timeout=120)
        self.said = said.decode(errors="replace")
        return process.returncode

    # ---- faults ----

    def fault(self, run: Path) -> dict:
        """One process that meets with one; what came of it."""
        kind, seconds = self.draw.choice(FAULTS), self.draw.uniform(1, LONGEST)
        if kind == "stop":
            code = self.wait(self.start(run), seconds, signal.SIGTERM)
        elif kind == "full":
            size = round(10 ** self.draw.uniform(3, 6.5))
            code = self.wait(self.start(run, size), LONGEST, signal.SIGTERM)
        else:
            code = self.wait(self.start(run), seconds, signal.SIGKILL)
        if code == 0 and (run / "model" / "manifest.json").is_file():
            kind = "none"  # it was through before anything happened
        elif kind == "flip":
            return self.flip(run) | {"steps": self.steps(run)}
        return self.found(kind, code) | {"steps": self.steps(run)}

    def flip(self, run: Path) -> dict:
        """A bit of a file of the run, and the start after it. Where that stops, the file is put
        back, as from a backup."""
        files = [x for x in run.rglob("*") if x.is_file() and x.stat().st_size]
        files = [x for x in files if x.suffix in (".json", ".safetensors", ".yaml")]
        if not files:
            return self.found("flip", 0) | {"file": None}
        path, backup = self.draw.choice(sorted(files)), self.work / "backup"
        shutil.copytree(run, backup)
        content = bytearray(path.read_bytes())
        place = self.draw.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        code = self.wait(self.start(run), self.draw.uniform(10, LONGEST), signal.SIGTERM)
        if code != 0:
            shutil.rmtree(run)
            backup.rename(run)
        shutil.rmtree(backup, ignore_errors=True)
        return self.found("flip", code) | {"file": str(path.relative_to(run))}

    def found(self, kind: str, code: int) -> dict:
        """Whether this exit is one of those that are right, with one sentence where it has one."""
        sentences = [line for line in self.said.splitlines() if line.startswith("error: ")]
        good = code in CODES[kind] and "Traceback" not in self.said
        good &= code <= 0 or len(sentences) == 1
        result = {"fault": kind, "code": code, "ok": good, "said": sentences}
        return result if good else result | {"all": self.said[-3000:]}

    # ---- the end ----

    @staticmethod
    def losses(run: Path) -> list:
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
        known = [json.loads(line) for line in lines]
        return [(x["step"], x["loss"]) for x in known if "loss" in x]

    def steps(self, run: Path) -> int:
        file = run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    def same(self, run: Path) -> dict:
        """Beside the run that nobody touched."""
        weights = [sha256(x / "model" / "model.safetensors") for x in (self.untouched, run)]
        losses = [self.losses(x) for x in (self.untouched, run)]
        found = {"weights": weights[0] == weights[1], "losses": losses[0] == losses[1]}
        return {"ended": run.name, "ok": all(found.values())} | found


def main(options: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    bad = faults = runs = 0
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options, Path(folder))
        print(json.dumps({"untouched_seconds": round(soak.seconds, 1)}), flush=True)
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end or runs == 0:
            run, done = Path(folder, f"run-{runs}"), False
            while not done:
                if time.monotonic() < end:
                    found = soak.fault(run)
                    faults += 1
                else:
                    found = soak.found("none", soak.wait(soak.start(run), None))
                bad += not found["ok"]
                print(json.dumps(found), flush=True)
                done = found["fault"] == "none"
            found = soak.same(run)
            bad, runs = bad + (not found["ok"]), runs + 1
            print(json.dumps(found), flush=True)
    print(f"{faults} faults in {runs} runs, {bad} of them not survived")
    return int(bad > 0)


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--minutes", type=float, default=60)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=600, help="of each run")
parser.add_argument("--tokenizer", default="smollm2-135m", help="the base whose tokenizer is used")
if __name__ == "__main__":
    sys.exit(main(parser.parse_args()))
