"""How much the columns of a linear's weight matter on calibration inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_evaluation.calibration import activations, at_tokens, calibration_of
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformations.linear import tensor_of, weight_and_bias
from bert_evaluation.transformations.written_attention import argument


@dataclass(frozen=True)
class Contribution:
    """How much each group of columns matters, and the mean of what the linear reads. float64."""

    matters: Tensor
    mean: Tensor


def contributions(graph: GraphModule, groups: Mapping[str, tuple[Sequence[Node], int]]) -> dict[str, Contribution]:
    """What each group of neighbouring columns adds to the results of linears that share one weight.

    `groups` has, by any name, the linears and the columns of a group. A group matters as much as is lost when what it
    adds is replaced by its mean: by its variance, the trace of W C Wᵀ for its columns W and the covariance C of what
    they read. Of several linears, the sum. This is FLAP's measure (An et al., "Fluctuation-based Adaptive Structured
    Pruning for Large Language Models", AAAI 2024), which needs no gradient. Raises CalibrationError.
    """
    linears = [linear for group, _ in groups.values() for linear in group]
    if not linears:
        return {}
    sources, sums = {linear: argument(linear, 0) for linear in linears}, dict[Node, list[Tensor]]()
    widths = {linear: width for group, width in groups.values() for linear in group}
    for inputs, values in activations(graph, sources.values(), calibration_of(graph).batches):
        for linear, source in sources.items():
            x = at_tokens(values[source], inputs).double()
            parts = x.reshape(len(x), -1, widths[linear]).transpose(0, 1)  # (groups, tokens, width)
            new = [x.new_tensor(len(x)), x.sum(0), parts.mT @ parts]
            sums[linear] = new if linear not in sums else [a + b for a, b in zip(sums[linear], new, strict=True)]
    found = {}
    for name, (group, width) in groups.items():
        weight = tensor_of(weight_and_bias(group[0])[0]).detach().double()
        columns = weight.reshape(len(weight), -1, width).transpose(0, 1)  # (groups, out, width)
        means = [sums[linear][1] / sums[linear][0] for linear in group]
        matters = torch.zeros(len(columns), dtype=torch.float64, device=weight.device)
        for linear, mean in zip(group, means, strict=True):
            center = mean.view(-1, width, 1)
            covariance = sums[linear][2] / sums[linear][0] - center @ center.mT
            matters += ((columns @ covariance) * columns).sum((1, 2))
        found[name] = Contribution(matters.clamp_min(0), torch.stack(means).mean(0))
    return found
