"""Sensitivity: how far each site of a transformation moves the outputs when it alone is applied; the worst are left."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.calibration import Inputs, activations, at_tokens, calibration_of
from bert_evaluation.errors import CalibrationError, UsageError
from bert_evaluation.graph import GraphModule
from bert_evaluation.transformation import Site, Transformation


@dataclass(frozen=True)
class Left(Site):
    """A site that is left as it is, with the sentence why."""

    reason: str = ""


def share_to_leave(leave: float) -> float:
    """The share of sites that are left, as it was given. Raises UsageError for what is none."""
    if isinstance(leave, bool) or not isinstance(leave, (int, float)) or not 0 <= leave < 1:
        raise UsageError(f"What is left is a share of the sites, 0 or more and below 1, not {leave!r}.")
    return leave


def with_worst_left(graph: GraphModule, transformation: Transformation, share: float) -> list[Site]:
    """The sites of a transformation; of those that nothing speaks against, the share that costs most is `Left`.

    All are left where there is nothing to calibrate with.
    """
    sites = list(transformation.sites(graph))
    try:
        costs = sensitivities(graph, transformation)
    except CalibrationError as error:
        return [Left(site.node, site.nodes, str(error)) for site in sites]
    ranked = sorted(costs, key=lambda name: -costs[name])
    count = math.floor(share * len(ranked) + 1e-9)  # 0.3 of 10 are 3, whatever floats say
    reasons = {name: _reason(costs[name], costs.values()) for name in ranked[:count]}
    return [Left(site.node, site.nodes, reasons[str(site)]) if str(site) in reasons else site for site in sites]


def _reason(cost: float, costs: Iterable[float]) -> str:
    """Why a site of this cost is left."""
    by = f"by {100 * math.sqrt(cost):.3g}% of their standard deviation"
    distance = "infinitely far" if math.isinf(cost) else by
    return f"Alone it moves the outputs {distance}, more than {sum(other < cost for other in costs)} other sites do."


def sensitivities(graph: GraphModule, transformation: Transformation) -> dict[str, float]:
    """What each site that nothing speaks against costs alone, by its name: its share of the outputs' variance.

    That is the squared distance of the outputs, at real tokens of the calibration inputs, from what they are without
    the transformation, over their own from their mean; 0.0001 is a hundredth of their standard deviation. Runs the
    graph once for each site, and leaves it as it is. Raises CalibrationError.

    Errors of rounding know little of each other, so these shares add up: of the built-in checkpoint's 24 linears in
    int8 to 1.03 times what all cost together, where divergences of the answers' probabilities add up to 1.7 times. And
    few questions rank sites as others do: between three batches by rank correlations of 0.93 to 0.95, where those
    divergences do by 0.88 to 0.94. Of its 42 sites in bfloat16 or float16 they add up to 0.84 times what all cost
    together: what lies between two of them is rounded by neither alone.
    """
    batches = calibration_of(graph).batches
    expected, costs = _outputs(graph, batches), dict[str, float]()
    for place, site in enumerate(transformation.sites(graph)):
        if transformation.why_not(site) is None:
            fork = graphs.fork(graph)
            transformation.rewrite(fork, list(transformation.sites(fork))[place])
            shares = [_moved(*pair) for pair in zip(expected, _outputs(fork, batches), strict=True)]
            costs[str(site)] = math.fsum(shares) / max(len(shares), 1)
    return costs


def _outputs(graph: GraphModule, batches: Iterable[Inputs]) -> list[Tensor]:
    """Each output that is of floats, at real tokens of all batches, as one row of numbers in float64."""
    output, parts = graph.graph.output_node(), list[list[Tensor]]()
    for inputs, values in activations(graph, [output], batches):
        floats = [each for each in graphs.output_tensors(values[output]) if each.is_floating_point()]
        # Logits are of shape (batch, length): a number is all that they have of a token.
        parts.append([at_tokens(each.unsqueeze(-1), inputs).double().flatten() for each in floats])
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def _moved(before: Tensor, after: Tensor) -> float:
    """How far an output was moved, as a share of its variance; without end where a number became none."""
    finite = before.isfinite()
    before, after = before[finite], after[finite]
    spread = (before - before.mean()).square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    share = float((after - before).square().sum() / spread)
    return math.inf if math.isnan(share) else share
