"""What rounding to bfloat16 costs, place by place, and how much of a difference in F1 is luck.

    python benchmarks/rounding.py [--dataset FILE] [--samples N] [--threads N]

Each place alone is rounded in a graph that computes in float32 otherwise, as kernels do that add up in float32: so it
runs on any processor. Errors so small add up nearly linearly. So their sum with every choice of signs is what other
roundings, of the same size, would have made of the logits: 16 draws, and the F1 of each. Signs are also given to
smaller errors, to say how small they would have to be. Only answers within `NEAR` of another, in logits, are computed
again; the line on all places together says how near those were that changed.
"""

import argparse
from itertools import product
from typing import Any

import numpy as np
import torch

from bert_evaluation import capture, evaluate, load
from bert_evaluation import graph as graphs
from bert_evaluation.builtin import QUESTIONS
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.squad import read_squad
from bert_evaluation.squad.answers import AnswerRule, Logits, Span, best_spans, choose
from bert_evaluation.squad.batches import Batching, batches, tensors
from bert_evaluation.squad.dataset import Example, sample
from bert_evaluation.squad.scores import judge
from bert_evaluation.squad.windows import Window, Windowing, question_first, windows

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
LOW, RULE, BATCHING, NEAR = torch.bfloat16, AnswerRule(), Batching(tokens=1024), 0.15
PLACES = ("weights and biases", "what LayerNorms return", "attention's inputs and results", "what GELUs return")
SIZES = (1.0, 0.9, 0.5, 0.25)


def main() -> None:
    """Print the error of each place, and the F1 of draws of errors of each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=str(QUESTIONS))
    parser.add_argument("--samples", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load()
    base, dataset = capture(model), sample(read_squad(options.dataset), options.samples)
    whole = evaluate(base, tokenizer, dataset, batching=BATCHING, streams=1)
    f1 = dict(zip(whole.details, map(float, whole.by_question[1]), strict=True))
    near = [example for example in dataset.examples if whole.details[example.id].margin < NEAR]
    print(f"{len(f1)} questions, F1 {whole.f1:.2f}; {len(near)} answers are within {NEAR} of another.\n")

    groups = list(batches(windows(tokenizer, near, Windowing()), BATCHING))
    exact = [logits(base, tokenizer, group) for group in groups]
    errors = {}
    print("| rounded | mean squared error of logits, × 1e-6 |\n|---|--:|")
    for place in (*PLACES, "all of them"):
        graph = rounded(base, PLACES if place not in PLACES else (place,))
        errors[place] = [logits(graph, tokenizer, group) - one for group, one in zip(groups, exact, strict=True)]
        squares = np.concatenate([error.ravel() ** 2 for error in errors[place]])
        print(f"| {place} | {1e6 * squares.mean():.1f} |")

    def share(found: list[Logits]) -> tuple[float, int, float]:
        """The share of Base's F1, how many answers changed, and how sure Base was of those at most, by logits."""
        answers = answered(near, tokenizer, groups, found)
        changed = [each for each in near if answers[each.id] != whole.answers[each.id]]
        gained = sum(judge(each, answers[each.id])[1] - f1[each.id] for each in changed)
        return 100 * (1 + gained / sum(f1.values())), len(changed), max_margin(changed)

    def max_margin(changed: list[Example]) -> float:
        return max((whole.details[each.id].margin for each in changed), default=0.0)

    together, number, widest = share([one + error for one, error in zip(exact, errors["all of them"], strict=True)])
    print(
        f"\nAll of them: {together:.2f}% of Base's F1, {number} answers changed, {widest:.3f} from another at most.\n"
    )
    print("| size of errors | share of Base's F1: mean, deviation, least, most | at least 99.9% | answers changed |")
    print("|--:|---|--:|--:|")
    for size in SIZES:
        shares, numbers = [], []
        for signs in product((1, -1), repeat=len(PLACES)):
            moved = [
                one + size * sum(sign * errors[place][index] for place, sign in zip(PLACES, signs, strict=True))
                for index, one in enumerate(exact)
            ]
            one_share, changed, _ = share(moved)
            shares.append(one_share)
            numbers.append(changed)
        spread = f"{np.mean(shares):.2f}, {np.std(shares):.2f}, {min(shares):.2f}, {max(shares):.2f}"
        print(
            f"| {size} | {spread} | {sum(each >= 99.9 for each in shares)} of {len(shares)} | {np.mean(numbers):.1f} |"
        )


def rounded(base: GraphModule, places: tuple[str, ...]) -> GraphModule:
    """The graph with these places rounded to bfloat16. The linear that makes the outputs is left, as in presets."""
    graph = graphs.fork(base)
    *inner, _ = graphs.calls(graph, aten.linear.default)
    if PLACES[0] in places:
        for parameter in {each for linear in inner for each in linear.all_input_nodes[1:]}:
            tensor = graphs.get_tensor(graph, str(parameter.target))
            assert tensor is not None
            graphs.set_tensor(graph, str(parameter.target), graphs.like(tensor.detach().to(LOW).float(), tensor))
    nodes = {
        PLACES[1]: list(graphs.calls(graph, aten.layer_norm.default)),
        PLACES[2]: [each for node in graphs.calls(graph, ATTENTION) for each in (*node.all_input_nodes[:3], node)],
        PLACES[3]: list(graphs.calls(graph, aten.gelu.default)),
    }
    for node in {each for place in places for each in nodes.get(place, ())}:
        round_after(node)
    graph.recompile()
    return graph


def round_after(node: Node) -> None:
    """Let all that read the node's result read it rounded."""
    with node.graph.inserting_after(node):
        low = node.graph.call_function(aten.to.dtype, (node, LOW))
    with node.graph.inserting_after(low):
        high = node.graph.call_function(aten.to.dtype, (low, torch.float32))
    node.replace_all_uses_with(high, delete_user_cb=lambda user: user is not low)


@torch.inference_mode()
def logits(graph: GraphModule, tokenizer: Any, group: list[Window]) -> Logits:
    """Start and end logits of a batch, (2, window, position)."""
    names, in_front = graphs.input_names(graph), not question_first(tokenizer)
    inputs = tensors(group, tokenizer.pad_token_id or 0, names, torch.device("cpu"), in_front)
    output = graph(**inputs)
    found: Logits = torch.stack([output["start_logits"], output["end_logits"]]).numpy()
    return found


def answered(
    questions: list[Example], tokenizer: Any, groups: list[list[Window]], found: list[Logits]
) -> dict[str, str]:
    """The answers that logits of batches say, by question id."""
    spans = [list[Span]() for _ in questions]
    for group, (start, end) in zip(groups, found, strict=True):
        for span in best_spans(group, start, end, RULE, not question_first(tokenizer)):
            spans[span.example].append(span)
    return {each.id: choose(each.context, own, RULE).text for each, own in zip(questions, spans, strict=True)}


if __name__ == "__main__":
    main()
