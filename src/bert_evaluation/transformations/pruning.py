"""Attention heads and inner neurons that matter least are taken out; the mean of what they added stays."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import onednn
from bert_evaluation.errors import CalibrationError, UsageError
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Approximates
from bert_evaluation.transformation import Site
from bert_evaluation.transformations.activations import Found, activation_at
from bert_evaluation.transformations.contributions import Contribution, contributions
from bert_evaluation.transformations.cuts import cut_columns, cut_rows, resize
from bert_evaluation.transformations.head_weights import Heads, attentions, read_heads, why_not_shared
from bert_evaluation.transformations.keeping import KeepsTensors, Kept
from bert_evaluation.transformations.linear import free_name, tensor_of, weight_and_bias, why_not_ours
from bert_evaluation.transformations.written_attention import NotAttentionError, argument, is_idle_dropout, readers

aten = torch.ops.aten
SELECT = aten.index_select.default
MULTIPLE = 32  # kernels are fast on rows of so many numbers


@dataclass(frozen=True)
class _Unit(Site):
    """A site with the columns of its second linear that go and the mean of what they read; or why none goes."""

    title: str = ""
    reason: str | None = None
    columns: tuple[int, ...] = ()
    mean: Tensor | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{super().__str__()}{self.title}"


class _Pruning(KeepsTensors):
    """Takes columns of a linear, and all that only they read, out; the mean of what they added goes into its bias."""

    promise = Approximates()
    calibrates = True

    def __init__(self, budget: float = 0.1) -> None:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1:
            raise UsageError(f"A budget is a share between 0 and 1, not {budget!r}.")
        self.budget = budget

    def why_not(self, site: Site) -> str | None:
        """Refuse what cannot be taken out, and what matters more than what the budget takes."""
        assert isinstance(site, _Unit)
        return site.reason

    def _share(self, count: int) -> int:
        """How many of so many are within the budget."""
        return math.floor(self.budget * count + 1e-9)  # 0.3 of 10 are 3, whatever floats say


class PruneHeads(_Pruning):
    """The attention heads that matter least are taken out: of all in the model, at most the share `budget`.

        q, k, v = [view(linear(x, W, b), [..., 12, 32])           q, k, v = [view(linear(x, W', b'), [..., 11, 32])
                   for W, b in ...]                                          for W', b' in ...]
        a = scaled_dot_product_attention(q, k, v)      becomes    a = scaled_dot_product_attention(q, k, v)
        y = linear(view(a, [..., 384]), W, b)                     y = linear(view(a, [..., 352]), W', b')

    A head is rows of the weights of query, key and value and columns of the last one. It matters as much as what it
    adds to y varies on calibration inputs (see `contributions`, `calibration`); the mean of that goes into b'. Heads of
    all layers are ranked together; no attention loses all of its own. A bias of each head (MPNet's positions) is
    selected from. A site is one head, in all layers that share its weights; last heads come first, so that the numbers
    of those before stay true.
    """

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every head, and every attention whose heads cannot be told apart."""
        groups, sites = dict[str, list[Heads]](), list[Site]()
        for node in attentions(graph):
            try:
                heads = read_heads(node)
                groups.setdefault(str(weight_and_bias(heads.made_by[0])[0].target), []).append(heads)
            except NotAttentionError as error:
                sites.append(_Unit(node, reason=str(error)))
        reasons = {name: why_not_shared(found) or _why_no_bias(found[0].read_by) for name, found in groups.items()}
        measured, missing = _measured(
            graph,
            {
                name: ([each.read_by for each in found], found[0].widths[2])
                for name, found in groups.items()
                if reasons[name] is None
            },
        )
        most = self._share(sum(found[0].count for found in groups.values()))
        stays = _why_kept(measured, most)
        for name, (first, *others) in groups.items():
            nodes, width = tuple(each.node for each in others), first.widths[2]
            for head in reversed(range(first.count)):
                reason, mean = reasons[name] or missing, None
                columns = tuple(range(head * width, (head + 1) * width))
                if name in measured:
                    mean = measured[name].mean[list(columns)]
                    reason = stays[name, head]
                sites.append(_Unit(first.node, nodes, f", head {head}", reason, columns, mean))
        return sites

    def rewrite(self, graph: GraphModule, site: Site) -> Kept:
        """Take the head's rows and columns out, and let the nodes between have one head less."""
        assert isinstance(site, _Unit)
        assert site.mean is not None
        found = [read_heads(node) for node in (site.node, *site.nodes)]
        first, head, kept = found[0], site.columns[0] // len(site.columns), Kept()
        for linear, width in zip(first.made_by, first.widths, strict=True):
            kept |= cut_rows(graph, linear, range(head * width, (head + 1) * width))
        kept |= cut_columns(graph, first.read_by, site.columns, site.mean)
        for each in found:
            for node, axis in each.axes.items():
                at = len(node.meta["val"].shape) - 1 if axis is None else axis
                resize(node, at, node.meta["val"].shape[at] // each.count * (each.count - 1))
                self.mark_as_transformed(node)
            self.mark_as_transformed(each.read_by)
            for bias, reader, axis in each.biases:
                kept |= self._select(graph, bias, reader, axis, [i for i in range(each.count) if i != head])
        return kept

    def _select(self, graph: GraphModule, bias: Node, reader: Node, axis: int, heads: list[int]) -> Kept:
        """Let the reader of a tensor with something for each head read that of these heads only."""
        if bias.target is SELECT and self.transformed(bias):  # for an earlier head
            stored = argument(bias, 2)
            name, index = str(stored.target), tensor_of(stored)
            graphs.set_tensor(graph, name, index[heads])
            graphs.propagate(stored)
            resize(bias, axis, len(heads))
            return {name: index}
        name = free_name(graph, f"{graphs.layer(reader) or 'attention'}_heads", "index")
        graphs.set_tensor(graph, name, torch.tensor(heads, device=bias.meta["val"].device))
        with graph.graph.inserting_before(reader):
            selected = graph.graph.call_function(SELECT, (bias, axis, graph.graph.get_attr(name)))
        selected.meta["val"] = bias.meta["val"]
        resize(selected, axis, len(heads))
        self.mark_as_transformed(selected)
        reader.replace_input_with(bias, selected)
        return {}


class PruneFeedForward(_Pruning):
    """The inner neurons of each feed-forward that matter least are taken out: at most the share `budget` of them.

        h = gelu(linear(x, W, b))        becomes        h = gelu(linear(x, W', b'))
        y = linear(h, V, c)                             y = linear(h, V', c')

    A neuron is a row of W and a column of V. It matters as much as what it adds to y varies on calibration inputs (see
    `contributions`, `calibration`); the mean of that goes into c'. So many are kept that their number is a multiple of
    32. A site is one pair of weights, wherever applied.
    """

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every activation, those of linears that share their weights together, and every linear fused with one."""
        pairs = dict[str, list[Found]]()
        for each in _activations(graph):
            weight = weight_and_bias(each.source)[0] if each.source.target is aten.linear.default else each.nodes[-1]
            pairs.setdefault(str(weight.target if weight.op == "get_attr" else weight), []).append(each)
        reasons = {name: _why_no_pair(found) for name, found in pairs.items()}
        measured, missing = _measured(
            graph,
            {name: ([_after(each)[-1] for each in found], 1) for name, found in pairs.items() if reasons[name] is None},
        )
        for name, found in pairs.items():
            node, *nodes = (each.nodes[-1] for each in found)
            if name not in measured:
                yield _Unit(node, tuple(nodes), reason=reasons[name] or missing)
                continue
            matters, inner = measured[name].matters, len(measured[name].mean)
            stay = math.ceil((inner - self._share(inner)) / MULTIPLE) * MULTIPLE
            columns = tuple(sorted(matters.argsort(stable=True)[: max(0, inner - stay)].tolist()))
            title, mean = f", {len(columns)} of {inner} neurons", measured[name].mean[list(columns)]
            reason = f"All {inner} neurons stay: their number is rounded up to a multiple of {MULTIPLE}."
            yield _Unit(node, tuple(nodes), title, None if columns else reason, columns, mean)
        for node in graphs.calls(graph, onednn.POINTWISE):
            if node.args[3] != "none":  # the activation is within
                yield _Unit(node, reason=f"{node.name} ends with {node.args[3]}; prune before FuseLinearActivation.")

    def rewrite(self, graph: GraphModule, site: Site) -> Kept:
        """Take rows of the first linear and columns of the second one out."""
        assert isinstance(site, _Unit)
        assert site.mean is not None
        found = [each for node in (site.node, *site.nodes) if (each := activation_at(node)) is not None]
        first = found[0].source
        left = tensor_of(weight_and_bias(first)[0]).shape[0] - len(site.columns)
        kept = cut_rows(graph, first, site.columns)
        kept |= cut_columns(graph, _after(found[0])[-1], site.columns, site.mean)
        for each in found:
            *between, second = _after(each)
            for node in (each.source, *each.nodes, *between):
                resize(node, len(node.meta["val"].shape) - 1, left)
                self.mark_as_transformed(node)
            self.mark_as_transformed(second)
        return kept


def _measured(
    graph: GraphModule, groups: Mapping[str, tuple[Sequence[Node], int]]
) -> tuple[dict[str, Contribution], str | None]:
    """What groups contribute, or why that cannot be told."""
    try:
        return contributions(graph, groups), None
    except CalibrationError as error:
        return {}, str(error)


def _why_kept(measured: Mapping[str, Contribution], most: int) -> dict[tuple[str, int], str | None]:
    """Why each head stays, by the name of its attention and its number; None for the `most` that matter least.

    Not all of any attention go.
    """
    ranked = sorted(
        (matters, place, name, head)
        for place, (name, each) in enumerate(measured.items())
        for head, matters in enumerate(each.matters.tolist())
    )
    left, going = {name: len(each.matters) for name, each in measured.items()}, 0
    reasons, largest = dict[tuple[str, int], str | None](), 0.0
    for matters, _, name, head in ranked:
        if most == 0:
            reason = f"The budget is less than one of {len(ranked)} heads."
        elif left[name] == 1:
            reason = "It is the last head of its attention."
        elif going == most:
            times = f"{matters / largest:.2g} times as much as any" if largest else "more than those"
            reason = f"It matters {times} within the budget."
        else:
            left[name], going, largest, reason = left[name] - 1, going + 1, matters, None
        reasons[name, head] = reason
    return reasons


def _why_no_bias(linear: Node) -> str | None:
    if weight_and_bias(linear)[1] is None:
        return f"{linear.name} has no bias to take up the mean of what would go."
    return None


def _activations(graph: GraphModule) -> Iterator[Found]:
    """Every activation that is not a part of a larger one."""
    found = [each for node in graph.graph.nodes if (each := activation_at(node)) is not None]
    inner = {node for each in found for node in each.nodes[:-1]}
    return (each for each in found if each.nodes[-1] not in inner)


def _after(found: Found) -> list[Node]:
    """The nodes that read an activation, one after the other, through dropouts that drop nothing."""
    nodes, node = list[Node](), found.nodes[-1]
    while len(after := readers(node)) == 1:
        node = after[0]
        nodes.append(node)
        if not is_idle_dropout(node):
            break
    return nodes


def _why_no_pair(found: Sequence[Found]) -> str | None:
    """Why these activations are not all between the same two linears, of which neurons could be taken out."""
    linears = list[Node]()
    for each in found:
        last, after = each.nodes[-1], _after(each)
        if each.source.target is not aten.linear.default:
            return f"{last.name} reads {each.source.name}, no plain linear: gated, fused or packed, it stays as it is."
        if not after or after[-1].target is not aten.linear.default or after[-1].args[0] not in (last, *after):
            return f"{last.name} is not read by one linear: this is no feed-forward."
        for node in (each.source, *each.nodes[:-1]):
            if outside := next((user for user in readers(node) if user not in each.nodes), None):
                return f"{node.name} is also read by {outside.name}."
        linears += [each.source, after[-1]]
    seconds = {weight_and_bias(linear)[0].target for linear in linears[1::2]}
    if len(seconds) > 1:
        return f"{linears[0].name} is applied several times, each before another linear."
    return why_not_ours(linears) or _why_no_bias(linears[1])
