"""Processes beside `gpu.py` that compile what it will need: it then finds that in the caches of torch's compiler.

    python benchmarks/gpu_ahead.py DEVICE MODEL RECIPE LENGTH

One process makes one recipe of one model, or what torch.compile makes of that, calls it with one text, and ends.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from gpu_rows import LARGE, PEER, Subject, bert, single

from bert_evaluation import load

RANDOM = "BERT-large"  # with random weights; any other model is a checkpoint


@dataclass(frozen=True)
class Wanted:
    """What to compile: a model, a recipe or `PEER`, and the tokens of the text that it is called with."""

    model: str
    recipe: str
    length: int


class Ahead:
    """Processes for all that is wanted, at once; `wait` for one before the same is made here."""

    def __init__(self, device: torch.device, wanted: Iterable[Wanted]) -> None:
        # The compiler starts processes for all cores by itself; these are several at once.
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._running = {
            (each.model, each.recipe): subprocess.Popen(  # noqa: S603
                [sys.executable, __file__, str(device), each.model, each.recipe, str(each.length)],
                env=environment,
                **quiet,
            )
            for each in wanted
        }

    def wait(self, model: str, recipe: str) -> bool:
        """Until it is compiled, or cannot be: then it cannot be here either, and that says why. Whether it was."""
        process = self._running.pop((model, recipe), None)
        return process is not None and process.wait() == 0

    def wait_for_all(self) -> None:
        """Until nothing is compiled beside the run any more, so that something can be timed."""
        for key in list(self._running):
            self.wait(*key)

    def end(self) -> None:
        """Whatever is still being compiled is not needed."""
        for process in self._running.values():
            process.kill()
        self._running.clear()


@torch.inference_mode()
def main(device: str, model: str, recipe: str, length: str) -> None:
    """Compile it."""
    warnings.filterwarnings("ignore")
    on = torch.device(device)
    subject = Subject(model, bert(LARGE, on) if model == RANDOM else load(model, on)[0], print)
    made = subject.peer if recipe == PEER else subject.ours(recipe)
    made(**single(subject, int(length)))


if __name__ == "__main__":
    main(*sys.argv[1:])
