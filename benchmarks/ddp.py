"""Two processes of torchrun beside one process with two threads: `python -m benchmarks.ddp`.

Both train the same network on the same batches, in turn (A B A B …), and log images per second of wall time for every
ten steps; the first stretch, with the start, is left out. Processes that wait for each other suffer more than threads
when somebody else takes a core, so that both the median stretch and the best one are told: the best is what a quiet
machine would do. With --processes 8 on a node of 8 GPUs, `--device cuda` compares with one GPU instead.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from rlboard.eventfile import read_scalars
from rlboard.registry import ROOT

RATE = "time/images_per_second"


def images_per_second(root: Path, name: str, processes: int, threads: int, options: list[str]) -> list[float]:
    """The rates of one training, a stretch each. Raises CalledProcessError where it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--", "rlboard"]
    plumbing = ["--log=minimal", f"--threads={threads}", "--log-dir", str(root), "--run-name", name]
    command = [sys.executable, *(launcher if processes > 1 else ["-m", "rlboard"]), "vision", "train"]
    subprocess.run([*command, *options, *plumbing], check=True, capture_output=True, cwd=ROOT)
    return [float(rate) for rate in read_scalars(root / "vision/train" / name, [RATE])[RATE].value[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5, help="pairs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["laptopnet", "resnet9"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    words = parser.parse_args()
    together = words.processes if words.device == "cpu" else 1  # threads of the one process
    for model in words.models:
        options = [
            *(f"--model={model}", "--data=shapes", f"--images={words.steps * words.batch_size}", "--epochs=1"),
            *(f"--batch-size={words.batch_size}", f"--device={words.device}", "--progressive=0", "--no-tta"),
            "--log-every=10",
        ]
        if model == "resnet9":
            options.append("--width=16")
        rates: tuple[list[float], list[float]] = ([], [])
        for run in range(words.runs):
            with tempfile.TemporaryDirectory() as directory:
                one = images_per_second(Path(directory), "one", 1, together, options)
                many = images_per_second(Path(directory), "many", words.processes, 1, options)
            print(f"{model}, pair {run + 1}: {median(one):,.0f} and {median(many):,.0f} images/s", flush=True)
            rates[0].extend(one)
            rates[1].extend(many)
        for name, of in (("median", median), ("best", max)):
            alone, shared = (of(each) for each in rates)
            print(
                f"{model}, {name} stretch of {words.runs} runs: one process with {together} threads {alone:,.0f} "
                f"images/s, {words.processes} processes {shared:,.0f}, ratio {shared / alone:.2f}"
            )


if __name__ == "__main__":
    main()
