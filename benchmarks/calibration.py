"""Is a difference called where there is none? Base against a copy of itself, many times, as `--infer` measures it.

    python benchmarks/calibration.py [--runs 200] [--precision 0.01] [--time-limit 3] [--batch 1] [--length 32]

Each run is a measurement of its own: Base, a fork of its graph under another name, and Base again for the noise, in
rounds of random order. At most 5 % of the runs should be called faster or slower. With `--slow-down 0.02` the fork
really takes so much longer (it waits): then most runs should say so.
"""

import argparse
import time
from collections import Counter

import torch
from rich.progress import track
from scipy.stats import binomtest

from bert_evaluation import capture, load
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.measurement import measure


class Slowed(torch.nn.Module):
    """A graph that takes longer by a share of what it takes."""

    def __init__(self, graph: torch.nn.Module, share: float) -> None:
        super().__init__()
        self.graph, self.share = graph, share

    def forward(self, **inputs: torch.Tensor) -> object:
        """Run the graph, then wait, at work."""
        start = time.perf_counter()
        result = self.graph(**inputs)
        end = time.perf_counter()
        until = end + self.share * (end - start)
        while time.perf_counter() < until:
            pass
        return result


def main() -> None:
    """Print how many runs were called faster, slower, or neither."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--precision", type=float, default=0.01)
    parser.add_argument("--time-limit", type=float, default=3.0, help="seconds a run")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--slow-down", type=float, default=0.0)
    options = parser.parse_args()

    model, _ = load()
    base = capture(model)
    other = graphs.fork(base)
    variants = {"Base": base, "Other": Slowed(other, options.slow_down) if options.slow_down else other}
    inputs = text_inputs(model, options.batch, options.length)
    verdicts, widths, rounds = Counter[str](), [], []
    for run in track(range(options.runs), "Runs"):
        found = measure(variants, inputs, precision=options.precision, time_limit=options.time_limit, seed=run)
        ratio = found.speedup("Other")
        verdicts[ratio.verdict] += 1
        widths.append((ratio.high - ratio.low) / 2)
        rounds.append(len(found.seconds["Base"]))
    called = options.runs - verdicts["cannot tell"]
    low, high = binomtest(called, options.runs).proportion_ci()
    print(f"{options.batch}×{options.length}, really slower by {options.slow_down:.1%}: {options.runs} runs,")
    print(f"called different: {called} = {called / options.runs:.1%} (95 %: {low:.1%} to {high:.1%}); {dict(verdicts)}")
    print(f"median rounds {sorted(rounds)[len(rounds) // 2]}, median half width {sorted(widths)[len(widths) // 2]:.2%}")


if __name__ == "__main__":
    main()
