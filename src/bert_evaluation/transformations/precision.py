"""Linears and attention in bfloat16, and all that lies between them."""

import math
import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import kernels, onednn, varlen
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformation import Approximates, ReversibleTransformation, Site
from bert_evaluation.transformations.activations import LARGEST, Found, activation_at
from bert_evaluation.transformations.linear import free_name, tensor_of, weight_and_bias
from bert_evaluation.transformations.tiles import ENDINGS, ending

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
ATTENTIONS = (ATTENTION, varlen.ATTENTION)
CAST = aten.to.dtype
LOW, HIGH = torch.bfloat16, torch.float32
_OTHER = {LOW: HIGH, HIGH: LOW}
OF = "bert_evaluation.bfloat16_of"  # key in the meta of a node that reads a cast parameter: the parameter's name
# What may stand between linears in bfloat16: it moves numbers, or computes each in float32 and rounds it once.
MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.slice.Tensor,
    aten.contiguous.default,
    aten.dropout.default,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)
ROUNDS_ONCE = (
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.layer_norm.default,
    *(activation.operator for activation in onednn.ACTIVATIONS),
)


class CastToBFloat16(ReversibleTransformation):
    """Linears and attention compute in bfloat16, and so does what lies between two of them.

        y = gelu(linear(x, W, b))            becomes        x' = to(x, bfloat16)
        z = linear(y, V, c)                                 y' = gelu(linear(x', W', b'))
                                                            z  = to(linear(y', V', c'), float32)

    Weights and biases are cast once and stored. A cast moves on, behind additions, activations and LayerNorms, until
    something needs float32, so that an encoder has one where it begins and one where it ends. Softmax inside of
    attention, and statistics and weights of LayerNorms, are float32 all the same; attention that is written out
    stays in float32 as it is. `keep` lists what else does: words in the paths of layers or in the names of operators
    ("LayerNorm": what it reads and returns too), and "logits" for the linears that make the outputs. A processor
    without bfloat16 would be slower: it is refused unless `anyway`, to measure what the answers lose.
    """

    promise = Approximates()

    def __init__(self, keep: Iterable[str] = ("embeddings", "logits"), anyway: bool = False) -> None:
        self.keep = words(keep)
        self.anyway = anyway

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear, those on integers too, every scaled_dot_product_attention and that of packed sequences."""
        return [Site(node) for node in graph.graph.nodes if _is_linear(node) or node.target in ATTENTIONS]

    def why_not(self, site: Site) -> str | None:
        """Refuse what is kept, is no float32, is written into, or would be slower here."""
        node = site.node
        if reason := why_kept(node, self.keep):
            return reason
        if (type_of := _type(node)) is not HIGH:
            return "It is in bfloat16 already." if type_of is LOW else f"It computes in {type_of}, not in float32."
        if node.target is ATTENTION:
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if isinstance(mask, Node) and _type(mask) is not torch.bool and keeps(mask) is None:
                return f"{mask.name} is added to the scores; what it hides with may be infinite in bfloat16."
        elif node.target is varlen.ATTENTION:
            pass  # its mask says how long the sequences are
        elif node.target is kernels.LINEAR:
            if ending(node) != ENDINGS:
                return f"{node.name} has taken in what follows it; cast before that."
        else:
            for parameter in _stored(node):
                if parameter.op != "get_attr":
                    return f"{node.name} reads {parameter.name}, which the graph computes: it is no stored parameter."
        for each in (node, *node.all_input_nodes):
            if writer := graphs.writer(each):
                return f"{writer.name} writes into {each.name} in place."
        value = node.meta["val"]
        reason = onednn.why_not(torch.empty(0, dtype=LOW, device=value.device))
        can_be_slow = value.device.type == "cpu" and node.target in (aten.linear.default, *ATTENTIONS, kernels.LINEAR)
        if reason is None or (self.anyway and can_be_slow):
            return None
        return f"{reason} It would be slower; anyway=True casts it all the same." if can_be_slow else reason

    def rewrite(self, graph: GraphModule, site: Site) -> list[tuple[str, Tensor]]:  # noqa: ARG002
        """Cast what it reads, once, and let what it returns be cast back as late as can be."""
        node, replaced = site.node, list[tuple[str, Tensor]]()
        stored = [] if node.target in (*ATTENTIONS, kernels.LINEAR) else _stored(node)
        for parameter in stored:
            replaced.append((str(parameter.target), tensor_of(parameter)))
            node.replace_input_with(parameter, _lowered(parameter, node))
        read = dict.fromkeys(ATTENTIONS, node.args[:3]) | {kernels.LINEAR: node.args[:1]}
        inputs = read.get(node.target, node.all_input_nodes)
        for mask in node.all_input_nodes if node.target is ATTENTION else ():
            if (keep := keeps(mask)) is not None:
                node.replace_input_with(mask, keep)
        for source in dict.fromkeys(inputs):
            if isinstance(source, Node) and _type(source) is HIGH:
                node.replace_input_with(source, _down(source, node))
        self._sink(self._to_low(node))
        return replaced

    def undo(self, graph: GraphModule, memo: list[tuple[str, Tensor]]) -> None:
        """Put the tensors themselves back."""
        for name, tensor in memo:
            graphs.set_tensor(graph, name, tensor)

    def _to_low(self, node: Node) -> list[Node]:
        """Say that the node, whose inputs are cast, returns bfloat16, and cast that back for all who read it."""
        self.mark_as_transformed(node)
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            node.meta["val"] = [each.to(LOW) for each in value]
            return [cast for part in list(node.users) for cast in self._to_low(part)]
        with node.graph.inserting_after(node):
            up = node.graph.call_function(CAST, (node, HIGH))
        up.meta["val"], node.meta["val"] = value, value.to(LOW)
        node.replace_all_uses_with(up, delete_user_cb=lambda user: user is not up)
        return [up]

    def _sink(self, casts: list[Node]) -> None:
        """Move casts to float32 behind what can do without them; they end where they are needed, or go."""
        while casts:
            cast = casts.pop()
            source = cast.args[0]
            assert isinstance(source, Node)
            if (spelt := _spelt_out(cast)) is not None and why_kept(spelt.nodes[-1], self.keep) is None:
                casts += self._to_low(_as_operator(spelt))
            for user in list(cast.users):
                if _is_cast(user, LOW):
                    user.replace_all_uses_with(source)
                    user.graph.erase_node(user)
                elif (inputs := self._low_inputs(user)) is not None:
                    for high, low in inputs.items():
                        user.replace_input_with(high, low)
                    casts += self._to_low(user)
            if not cast.users:
                cast.graph.erase_node(cast)

    def _low_inputs(self, node: Node) -> dict[Node, Node] | None:
        """What there is in bfloat16 of each float32 tensor that the node computes with; None if it has to stay."""
        if node.target not in (*MOVES, *ROUNDS_ONCE) or why_kept(node, self.keep) or graphs.writer(node):
            return None
        parts = not isinstance(node.meta["val"], Tensor)
        if _type(node) is not HIGH or (parts and any(user.target is not operator.getitem for user in node.users)):
            return None
        # A sum or product with a number is part of something longer, which would be rounded at each step.
        if node.target in (aten.add.Tensor, aten.mul.Tensor) and len(node.all_input_nodes) < 2:
            return None
        # A LayerNorm takes weights in float32.
        read = node.args[:1] if node.target is aten.layer_norm.default else node.all_input_nodes
        sources = [each for each in read if isinstance(each, Node) and _type(each) is HIGH]
        low = {each: _known_low(each, node) for each in sources}
        return None if None in low.values() else {high: each for high, each in low.items() if each is not None}


def keeps(mask: Node) -> Node | None:
    """The boolean mask that an additive one, 0 or -inf, was made of: attention makes the same of either."""
    if mask.target is not aten.where.ScalarOther or mask.args[2] != -math.inf:
        return None
    keep, zero = mask.args[:2]
    assert isinstance(keep, Node)
    is_zero = isinstance(zero, Node) and zero.target is aten.zeros.default
    return keep if is_zero and _type(keep) is torch.bool else None


def words(keep: Iterable[str]) -> tuple[str, ...]:
    """A keep list as it was given, or the one word. Raises TypeError for anything else."""
    found = (keep,) if isinstance(keep, str) else tuple(keep)
    if not all(isinstance(word, str) for word in found):
        raise TypeError(f"A keep list has words, not {found}.")
    return found


def why_kept(node: Node, keep: Iterable[str]) -> str | None:
    """Why the keep list leaves a node as it is, if it does."""
    for word in keep:
        if word == "logits":
            if _is_linear(node) and _makes_outputs(node):
                return "The keep list has 'logits', and this makes an output."
        elif any(_is_in(_plain(word), _plain(name)) for name in (graphs.layer(node), str(node.target))):
            return f"The keep list has {word!r}."
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _is_in(word: str, name: str) -> bool:
    """Whether the name has the word; numbers in it are whole ones: `layer.1` is not in `layer.10`."""
    within_a_number = r"(?<=\d)(?=\d)"
    return re.search(rf"(?!{within_a_number}){re.escape(word)}(?!{within_a_number})", name) is not None


def _makes_outputs(node: Node) -> bool:
    """Whether the result reaches an output by no other linear and no attention."""
    return any(
        user.op == "output" or (not _is_linear(user) and user.target not in ATTENTIONS and _makes_outputs(user))
        for user in node.users
    )


def _is_linear(node: Node) -> bool:
    return onednn.is_linear(node) or node.target is kernels.LINEAR


def _stored(linear: Node) -> list[Node]:
    """The nodes of a linear's weight and bias."""
    if linear.target is aten.linear.default:
        return [each for each in weight_and_bias(linear) if each is not None]
    first = 2 if linear.target is onednn.BINARY else 1
    return [each for each in linear.args[first : first + 2] if isinstance(each, Node)]


def _lowered(parameter: Node, reader: Node) -> Node:
    """A node for the parameter in bfloat16, stored beside it, once for all linears that read it."""
    graph, name = reader.graph.owning_module, str(parameter.target)
    assert graph is not None
    known = next((each for each in reader.graph.find_nodes(op="get_attr") if each.meta.get(OF) == name), None)
    if known is None:
        leaf = name.rpartition(".")[2]
        target = free_name(graph, f"{name.removesuffix(f'.{leaf}')}_bfloat16", leaf)
        graphs.set_tensor(graph, target, _cast(tensor_of(parameter)))
    else:
        target = str(known.target)
    with reader.graph.inserting_before(reader):
        node = reader.graph.get_attr(target)
    node.meta[OF] = name
    return node


def _cast(tensor: Tensor) -> Tensor:
    if tensor.is_mkldnn:
        return onednn.pack(onednn.unpack(tensor).to(LOW))
    return graphs.like(tensor.detach().to(LOW), tensor)


def _down(source: Node, reader: Node) -> Node:
    """The node's result in bfloat16: as it was computed, as it is cast for others, or cast."""
    if known := _known_low(source, reader):
        return known
    inputs = source.graph.find_nodes(op="placeholder")
    with source.graph.inserting_after(inputs[-1] if source in inputs else source):
        cast = source.graph.call_function(CAST, (source, LOW))
    cast.meta["val"] = source.meta["val"].to(LOW)
    return cast


def _known_low(source: Node, reader: Node) -> Node | None:
    if _is_cast(source, HIGH):
        return source.all_input_nodes[0]
    return next((user for user in source.users if _is_cast(user, LOW) and user < reader), None)


def _is_cast(node: Node, to: torch.dtype) -> bool:
    """Whether the node casts from one of the two types to the other one, `to`."""
    return node.target is CAST and node.args[1:] == (to,) and _type(node.all_input_nodes[0]) is _OTHER[to]


def _type(node: Node) -> torch.dtype | None:
    """The type of what the node returns, or of all its parts."""
    value: Any = node.meta.get("val")
    types = {
        each.dtype for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, Tensor)
    }
    return types.pop() if len(types) == 1 else None


def _spelt_out(cast: Node) -> Found | None:
    """The activation of what was cast that takes several nodes, all its own, to write down."""
    best, node = None, cast
    for _ in range(LARGEST):
        node = node.next
        found = activation_at(node)
        if found is not None and found.source is cast and len(found.nodes) > 1:
            inner = [user for each in found.nodes[:-1] for user in each.users]
            best = found if set(inner) <= set(found.nodes) else best
    return best


def _as_operator(found: Found) -> Node:
    """Write an activation as one operator, which rounds once."""
    last = found.nodes[-1]
    with last.graph.inserting_before(last):
        node = last.graph.call_function(found.activation.operator, (found.source.args[0],), found.activation.keywords)
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    for each in reversed(found.nodes):
        each.graph.erase_node(each)
    return node
