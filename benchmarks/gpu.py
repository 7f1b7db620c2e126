"""All that is measured of one NVIDIA GPU, in one run: throughput, latency, quality, checks, kernels.

    python benchmarks/gpu.py [--parts A,B,C,D,E,F,G] [--squad FILE] [--minutes 7.5] [--json FILE]
    python benchmarks/gpu.py --quick --device cpu

A  throughput of BERT-large on windows of SQuAD's lengths: ours, eager, and what the GPU reaches at most
B  latency of one text: 1 × 128 with BERT-large, 1 × 32 with a checkpoint, the built-in one unless another is named
C  quality of that checkpoint on a SQuAD file, or on the built-in questions
D  promises of our recipes, held by `verify` on that checkpoint
E  kernels of ours: their share of the time by what they do, the longest ones, and how long the GPU waits
F  clock, temperature and power around and during each part
G  throughput once more, against torch.compile at its best, which takes long to compile

Tables go to the standard output, each as soon as it is known; progress to the standard error. What the time does not
suffice for is left out and named. Ratios are of turns in the same rounds.
"""

import gc
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_ahead import RANDOM, Ahead
from gpu_parts import Parts, Settings, wanted
from gpu_rows import LARGE, SMALL, attempt
from gpu_state import Budget, about, sentence, state
from gpu_tables import span

from bert_evaluation.device import choose_device
from bert_evaluation.errors import BertEvaluationError, UsageError

# In this order, with the seconds that each takes at least, compilation included: with fewer left it is not begun. Only
# long passes are timed behind the profiler, which may leave launches slower.
NEEDS = {"A": 60, "D": 30, "B": 60, "C": 20, "E": 10, "G": 60}
QUICK: dict[str, Any] = {
    "title": "a small BERT",
    "sizes": SMALL,
    "windows": 33,
    "tokens": 1024,
    "rounds": 2,
    "peak": 256,
    "calls": 3,
    "texts": (16, 8),
    "questions": 12,
    "longest_probe": 16,
    "profiled": 2,
}


def main(
    parts: Annotated[str, typer.Option(help="which, by letters")] = "A,B,C,D,E,F,G",
    checkpoint: Annotated[
        str, typer.Option(help="for quality and promises: built-in, a folder or a hub name")
    ] = "built-in",
    squad: Annotated[Path | None, typer.Option(help="a SQuAD file for lengths and quality")] = None,
    windows: Annotated[int, typer.Option(help="of a pass, at most as many as the file has")] = Settings.windows,
    tokens: Annotated[int, typer.Option(help="real tokens of a batch of ours")] = Settings.tokens,
    rounds: Annotated[int, typer.Option(help="passes of each row, fewer where time is short")] = Settings.rounds,
    minutes: Annotated[float, typer.Option(help="what is not done by then is left out, and named")] = 7.5,
    device: Annotated[str, typer.Option(help="cuda, cuda:1; cpu is for trying this program")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="little of everything: it says nothing of the speed")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every time there")] = None,
) -> None:
    """Tables in Markdown, each as soon as it is known; progress on the standard error."""
    warnings.filterwarnings("ignore")
    budget = Budget(60 * minutes)
    try:
        letters = _letters(parts)
        on = choose_device(device)
    except BertEvaluationError as error:
        raise SystemExit(str(error)) from None
    if on.index is not None:
        torch.cuda.set_device(on)
    settings = Settings(on, RANDOM, LARGE, checkpoint, squad, windows, tokens, rounds)
    if quick:
        settings = replace(settings, **QUICK)
    result: dict[str, Any] = {"machine": about(on), "arguments": sys.argv[1:], "parts": {}, "state": {}}

    def say(text: str) -> None:
        print(f"[{budget.spent:5.0f} s] {text}", file=sys.stderr, flush=True)

    # What is small compiles faster than another process starts.
    ahead = Ahead(on, () if quick else wanted(letters, settings))
    run = Parts(settings, budget, say, ahead)

    def finish() -> None:
        """Name what was left out, and write what there is."""
        ahead.end()
        result["left_out"] = budget.left_out | run.left_out
        if "F" in letters:
            print("\n### Clock, temperature and power\n")
            for name, states in result["state"].items():
                print(f"- {name}: {span(states)}")
        print(f"\n{budget.spent:.0f} s in all; left out: {len(result['left_out']) or 'nothing'}")
        for name, reason in result["left_out"].items():
            print(f"- {name}: {reason}")
        _write(json_file, result)

    print(
        f"{sentence(result['machine'])}. Inputs are on the device beforehand.", flush=True
    )  # as in MLPerf's offline scenario
    budget.at_the_end(finish)
    result["state"]["at the start"] = [state(on)]
    ways = {
        "A": run.throughput,
        "B": run.latency,
        "C": run.quality,
        "D": run.checks,
        "E": run.profile,
        "G": run.against_compile,
    }
    try:
        for letter, needed in NEEDS.items():
            name = f"part {letter}"
            if letter in letters and budget.allows(name, 0 if quick else needed):
                say(f"{name} begins")
                run.states.clear()

                def carry_out(letter: str = letter) -> None:
                    result["parts"][letter] = ways[letter]()

                if (failed := attempt(name, carry_out, say)) is not None:
                    budget.left_out[name] = failed
                result["state"][name] = [*run.states, state(on)]
                _write(json_file, result)
                gc.collect()
                if on.type == "cuda":
                    torch.cuda.empty_cache()
    finally:
        budget.is_over()
        ahead.end()
    finish()


def _letters(text: str) -> list[str]:
    letters = [each.strip().upper() for each in text.split(",")]
    if unknown := [each for each in letters if each not in (*NEEDS, "F")]:
        raise UsageError(f"There is no part {', '.join(unknown)!r}; there are A to G, such as A,B,C.")
    return letters


def _write(file: Path | None, result: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
