"""How much of a call is not work: the share of Python, dispatch and other fixed costs, by recipe.

    python benchmarks/overhead.py [--shape 1x32] [--rounds 200] [--calls 1] [--threads N] RECIPE...

The fixed cost of a call is what it takes where there is next to nothing to compute: in a twin of the checkpoint with as
many layers, but one head, 32 wide, on a single token. Its graph has the same nodes, so it has the same calls of
operators, their arguments parsed and dispatched, memory allocated, results named. What grows with the work is left out;
what an operator does at least is in it, so this is the most that the overhead can be, without a profiler's own.
Python's part of a call is what passes outside of the library that a graph is compiled to (`+Compile`, on a CPU): inputs
are checked, and results get back to where the model returns them. It is within the fixed cost.

The calls of all take turns in random order, so each finds the caches full of the others' code and weights, as after a
pause; with `--calls 20` a turn is 20 calls, as where one model answers one question after the other. `Base` is the
captured graph as it is.
"""

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering

from bert_evaluation import aot_inductor, capture, compiled, load
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.measurement import Plan, sample, timed
from bert_evaluation.stats import median
from bert_evaluation.transformations import PRESETS, REGISTRY, parse_recipe

WIDTH = 32
CPU = torch.device("cpu")
Variant = tuple[graphs.GraphModule, Mapping[str, Tensor]]


def main() -> None:
    """Print, for each recipe, the milliseconds of a call, of its fixed cost, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["exact", "exact+Compile"])
    parser.add_argument("--shape", default="1x32", help="batch × length")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=1, help="calls in a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, length = map(int, options.shape.split("x"))

    model, _ = load()
    twin = narrow(model)
    inside = Inside(aot_inductor.library)
    aot_inductor.library = inside.library
    variants = dict[str, Variant]()
    for text in ("LintAndRecompile", *options.recipes):
        for name, module, inputs in (
            (text, model, text_inputs(model, batch, length)),
            (f"{text}, fixed", twin, text_inputs(twin, 1, 1)),
        ):
            variants[name] = parse_recipe(text, REGISTRY, PRESETS)(capture(module)), inputs
        here, there = variants[text][0], variants[f"{text}, fixed"][0]
        if len(here.graph.nodes) != len(there.graph.nodes):
            print(f"{text}: the twin has {len(there.graph.nodes)} nodes instead of {len(here.graph.nodes)}.")
    compiled.prepare(graph for graph, _ in variants.values())

    outside = defaultdict[str, list[float]](list)

    def call(name: str) -> float:
        graph, inputs = variants[name]
        inside.seconds = 0.0

        def turn() -> None:
            for _ in range(options.calls):
                graph(**inputs)

        seconds = timed(turn, CPU)[0]
        if inside.seconds:
            outside[name].append((seconds - inside.seconds) / options.calls)
        return seconds / options.calls

    with torch.inference_mode():
        seconds = sample(call, list(variants), Plan(rounds=options.rounds)).seconds
    rounds = f"{options.rounds} rounds of {options.calls}"
    print(f"{options.shape} tokens, {options.threads} threads, {rounds} calls, medians\n")
    print("| recipe | nodes | call, ms | fixed, ms | share | Python, ms | share |\n|---|--:|--:|--:|--:|--:|--:|")
    for text in ("LintAndRecompile", *options.recipes):
        whole, fixed = (1000 * median(seconds[name]).estimate for name in (text, f"{text}, fixed"))
        name = "Base" if text == "LintAndRecompile" else text
        python = 1000 * median(outside[text]).estimate if text in outside else None
        part = "– | –" if python is None else f"{python:.3f} | {python / whole:.1%}"
        nodes = len(variants[text][0].graph.nodes)
        print(f"| {name} | {nodes} | {whole:.2f} | {fixed:.2f} | {fixed / whole:.1%} | {part} |")


class Inside:
    """Makes libraries like `library`, and adds up the seconds that pass in them."""

    def __init__(self, library: Callable[..., Callable[..., Any]]) -> None:
        self.seconds = 0.0
        self._library = library

    def library(self, *arguments: Any) -> Callable[..., Any]:
        """A library whose calls are timed."""
        call = self._library(*arguments)

        def run(inputs: Mapping[str, Tensor]) -> Any:
            start = time.perf_counter()
            results = call(inputs)
            self.seconds += time.perf_counter() - start
            return results

        return run


def narrow(model: nn.Module) -> nn.Module:
    """A model like this one with random weights, one head and next to no width."""
    config = copy.deepcopy(model.config)
    config.hidden_size, config.num_attention_heads, config.intermediate_size = WIDTH, 1, 2 * WIDTH
    return AutoModelForQuestionAnswering.from_config(config).to(model.dtype).eval()


if __name__ == "__main__":
    main()
