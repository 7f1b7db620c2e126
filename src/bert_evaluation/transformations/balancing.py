"""Outliers in what linears read are moved into their weights, so that both lose less where they are rounded."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import kernels
from bert_evaluation.calibration import activations, at_tokens, calibration_of
from bert_evaluation.errors import CalibrationError, UsageError
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import Site
from bert_evaluation.transformations.casts import NORM
from bert_evaluation.transformations.keep_list import why_kept, words
from bert_evaluation.transformations.keeping import KeepsTensors, Kept
from bert_evaluation.transformations.linear import parameters, tensor_of, weight_and_bias, why_not_ours
from bert_evaluation.transformations.linear import readers as readers_of_stored
from bert_evaluation.transformations.written_attention import argument, is_idle_dropout, readers, shape_of

aten = torch.ops.aten
PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
SMALLEST = 1e-5  # of the largest column: what is smaller is taken for that


class _NoFactorError(Exception):
    """Why columns cannot be divided where they are made, as a sentence."""


@dataclass(frozen=True)
class _Made:
    """What makes the columns that linears read: a LayerNorm, or these rows of another linear."""

    node: Node
    stored: tuple[Node, ...]  # its weight and bias
    rows: tuple[int | None, int | None] = (None, None)  # from, to


@dataclass(frozen=True)
class _Columns(Site):
    """The linears that read one tensor, what makes it, and what each column is divided by; or why it stays."""

    reason: str | None = None
    made: _Made | None = None
    factors: Tensor | None = field(default=None, compare=False)


class BalanceLinears(KeepsTensors):
    """Outliers in what linears read go into their weights: SmoothQuant, for QuantizeLinears to come.

        x = layer_norm(h, g, b)                 becomes        x = layer_norm(h, g / s, b / s)
        y = linear(x, W, c)                                    y = linear(x, W * s, c)
        ---------------------------------------------------------------------------------------
        x = gelu(u) * linear(h, V, d)           becomes        x = gelu(u) * linear(h, V / s, d / s)
        y = linear(x, W, c)                                    y = linear(x, W * s, c)

    A token's scale is that of its largest number, so one large column leaves few of the 127 steps to the others. With a
    the largest number of a column at real tokens of the calibration inputs (see `calibration`) and w the largest that
    it is multiplied by, s = a**strength / w**(1 - strength), scaled to a geometric mean of 1 (Xiao et al.,
    "SmoothQuant", ICML 2023). By itself it does nothing but round differently. Not every outlier is in the way: one
    that matters is better told exactly. So a site is refused where its linears, quantised, err no less for it there.

    A column is divided where it is made: by a LayerNorm, as one factor of a gated feed-forward, or by a linear before a
    ReLU. So it is for encoders that normalise what goes into a layer (ModernBERT), and for MobileBERT's feed-forwards.
    Where the LayerNorm comes last, as in BERT, its result is also what the next layer adds to, and no factor moves
    through GELU: those are refused. The result of attention is too: it is a mean of values, with few outliers. `keep`
    is QuantizeLinears' own: what is not quantised need not be balanced. A site is all linears that read one tensor.
    """

    promise = Reassociates()
    calibrates = True

    def __init__(self, strength: float = 0.5, keep: Iterable[str] = ("embeddings", "logits")) -> None:
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise UsageError(f"A strength is a number from 0 to 1, not {strength!r}.")
        self.strength = strength
        self.keep = words(keep)

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every tensor that linears read, with what its columns are to be divided by."""
        groups, made, reasons = dict[Node, list[Node]](), dict[Node, _Made](), dict[Node, str]()
        for linear in graphs.calls(graph, aten.linear.default):
            groups.setdefault(argument(linear, 0), []).append(linear)
        for source, linears in groups.items():
            try:
                made[source] = _made(source, linears, self.keep)
            except _NoFactorError as error:
                reasons[source] = str(error)
        factors, errors = dict[Node, Tensor](), dict[Node, float]()
        try:
            largest = _largest(graph, made)
            factors = {each: _factors(largest[each], _weights(groups[each]), self.strength) for each in made}
            errors = _errors(graph, {each: (groups[each], by) for each, by in factors.items()})
        except CalibrationError as error:
            reasons |= dict.fromkeys(made, str(error))
        for source, times in errors.items():
            if not times < 1:
                reasons[source] = f"Balanced and quantised, it errs {times:.2f} times as much as quantised alone."
        for source, (linear, *others) in groups.items():
            yield _Columns(linear, tuple(others), reasons.get(source), made.get(source), factors.get(source))

    def why_not(self, site: Site) -> str | None:
        """Refuse what no factor moves out of, and what others read or share the weights of."""
        assert isinstance(site, _Columns)
        return site.reason

    def rewrite(self, graph: GraphModule, site: Site) -> Kept:
        """Divide what makes the columns, and multiply what reads them."""
        assert isinstance(site, _Columns)
        assert site.made is not None
        assert site.factors is not None
        kept, linears = Kept(), (site.node, *site.nodes)
        for stored in site.made.stored:
            after = (before := tensor_of(stored)).detach().double().clone()
            after[slice(*site.made.rows)] /= site.factors.view(-1, *[1] * (after.dim() - 1))
            kept |= _replace(graph, stored, before, after)
        weights = (weight_and_bias(linear)[0] for linear in linears)
        for stored in {weight.target: weight for weight in weights}.values():
            before = tensor_of(stored)
            kept |= _replace(graph, stored, before, before.detach().double() * site.factors)
        for node in (site.made.node, *linears):
            self.mark_as_transformed(node)
        return kept


def _replace(graph: GraphModule, stored: Node, before: Tensor, after: Tensor) -> Kept:
    graphs.set_tensor(graph, str(stored.target), graphs.like(after.to(before.dtype), before))
    return {str(stored.target): before}


def _largest(graph: GraphModule, sources: Iterable[Node]) -> dict[Node, Tensor]:
    """The largest number of each column of these nodes, at real tokens of the calibration inputs. float64."""
    largest, nodes = dict[Node, Tensor](), tuple(sources)
    if not nodes:
        return largest
    for inputs, values in activations(graph, nodes, calibration_of(graph).batches):
        for node, value in values.items():
            new = at_tokens(value, inputs).double().abs().flatten(0, -2).amax(0)
            largest[node] = torch.maximum(largest[node], new) if node in largest else new
    return largest


def _factors(largest: Tensor, weights: Tensor, strength: float) -> Tensor:
    """What each column is divided by, and weights multiplied with; their geometric mean is 1."""
    logs = strength * _log(largest) - (1 - strength) * _log(weights.abs().amax(0))
    return (logs - logs.mean()).exp()


def _errors(graph: GraphModule, groups: Mapping[Node, tuple[Sequence[Node], Tensor]]) -> dict[Node, float]:
    """How much more linears err, by squares, if they are balanced before they are quantised; by what they read."""
    plain, balanced = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0.0)
    for inputs, values in activations(graph, groups, calibration_of(graph).batches) if groups else ():
        for source, (linears, factors) in groups.items():
            x, weights = at_tokens(values[source], inputs).flatten(0, -2).double(), _weights(linears)
            exact = x @ weights.mT
            plain[source] += float((_rounded(x) @ _rounded(weights).mT - exact).square().sum())
            product = _rounded(x / factors) @ _rounded(weights * factors).mT
            balanced[source] += float((product - exact).square().sum())
    return {each: balanced[each] / max(error, torch.finfo(torch.float64).tiny) for each, error in plain.items()}


def _rounded(rows: Tensor) -> Tensor:
    """Rows of numbers, each of the 255 that its 8-bit integers stand for."""
    numbers, steps = kernels.quantize(rows)
    return numbers * steps


def _weights(linears: Sequence[Node]) -> Tensor:
    """The weights of linears, below each other. float64."""
    return torch.cat([tensor_of(weight_and_bias(linear)[0]).detach().double() for linear in linears])


def _log(columns: Tensor) -> Tensor:
    return columns.clamp_min(SMALLEST * columns.amax()).clamp_min(torch.finfo(torch.float32).tiny).log()


def _made(source: Node, linears: Sequence[Node], keep: Iterable[str]) -> _Made:
    """What makes the columns that only these linears read. Raises _NoFactorError where there is no such."""
    if reason := next((reason for linear in linears if (reason := why_kept(linear, keep))), None):
        raise _NoFactorError(reason)
    _only(source, linears)
    if reason := why_not_ours(linears):
        raise _NoFactorError(reason)
    node = source
    while is_idle_dropout(node) or node.target is aten.relu.default:
        node = _before(node)
    if node.target is NORM:
        stored = tuple(each for each in node.args[2:4] if isinstance(each, Node))
        if not isinstance(node.args[2], Node) or len(tensor_of(stored[0]).shape) != 1:
            raise _NoFactorError(f"{node.name} has no weight of its own for each column.")
        if shared := next((each for each in stored if readers_of_stored(each) != [node]), None):
            raise _NoFactorError(f"{shared.target} is also read by others than {node.name}.")
        return _Made(node, stored)
    if node.target is not aten.mul.Tensor:
        return _rows(node)
    factors = [each for each in node.args if isinstance(each, Node) and shape_of(each) == shape_of(node)]
    for factor in factors if len(set(factors)) == 2 else ():
        try:
            _only(factor, [node])
            return _rows(factor)
        except _NoFactorError:
            continue
    raise _NoFactorError(f"No factor of {node.name} is made by a linear for it alone.")


def _rows(node: Node) -> _Made:
    """The linear, or the part of it, that a node is the result of."""
    rows = _Made.rows
    if node.target is operator.getitem and argument(node, 0).target in PARTS:
        parts, index = argument(node, 0), node.args[1]
        assert isinstance(index, int)
        sizes = [part.shape[-1] for part in parts.meta["val"]]
        axis: Any = parts.args[2] if len(parts.args) > 2 else 0
        if (
            axis not in (-1, len(shape_of(node)) - 1)
            or len([each for each in parts.users if each.args[1] == index]) > 1
        ):
            raise _NoFactorError(f"{node.name} is not simply rows of one linear.")
        rows, node = (sum(sizes[:index]), sum(sizes[: index + 1])), _before(parts)
    if node.target is not aten.linear.default:
        raise _NoFactorError(f"It reads the result of {node.name} ({node.target}), from which no factor moves.")
    if reason := why_not_ours([node]):
        raise _NoFactorError(reason)
    return _Made(node, tuple(parameters(node)), rows)


def _before(node: Node) -> Node:
    """What a node reads, if only it does so."""
    _only(before := argument(node, 0), [node])
    return before


def _only(node: Node, wanted: Sequence[Node]) -> None:
    if other := next((each for each in readers(node) if each not in wanted), None):
        raise _NoFactorError(f"{other.name} reads {node.name} too, and would get other numbers.")
    if writer := graphs.writer(node):
        raise _NoFactorError(f"{writer.name} writes into {node.name} in place.")
