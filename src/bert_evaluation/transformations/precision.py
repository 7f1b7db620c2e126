"""Linears and attention in bfloat16 or float16, and all that lies between them."""

import operator
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import kernels, onednn
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.transformation import Site
from bert_evaluation.transformations.casts import (
    CAST,
    HIGH,
    MOVES,
    NORM,
    ROUNDS_ONCE,
    SUMS_AND_PRODUCTS,
    as_operator,
    cast_down,
    is_cast,
    known_low,
    lower_stored,
    name_of,
    spelt_out,
    stored,
    type_of,
)
from bert_evaluation.transformations.keep_list import ATTENTION, ATTENTIONS, why_kept
from bert_evaluation.transformations.linear import tensor_of
from bert_evaluation.transformations.padding_mask import boolean_of
from bert_evaluation.transformations.positions import LINEARS
from bert_evaluation.transformations.rounding import Rounding
from bert_evaluation.transformations.tiles import ENDINGS, ending

aten = torch.ops.aten


class Cast(Rounding):
    """Linears and attention compute in the type `low`, and so does what lies between two of them."""

    low: ClassVar[torch.dtype]

    def every_site(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear, those on integers too, every scaled_dot_product_attention and that of packed sequences."""
        return [Site(node) for node in graph.graph.nodes if node.target in (*LINEARS, *ATTENTIONS)]

    def why_not(self, site: Site) -> str | None:
        """Refuse what is kept or left, is no float32, is written into, or would be slower here."""
        node, name = site.node, name_of(self.low)
        if reason := super().why_not(site):
            return reason
        if (found := type_of(node)) is not HIGH:
            return f"It is in {name} already." if found is self.low else f"It computes in {found}, not in float32."
        if node.target is ATTENTION:
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if isinstance(mask, Node) and type_of(mask) is not torch.bool and boolean_of(mask) is None:
                return f"{mask.name} is added to the scores; what it hides with may be infinite in {name}."
        elif node.target is kernels.LINEAR:
            weight = node.args[1]
            assert isinstance(weight, Node)
            if tensor_of(weight).dtype is HIGH or kernels.is_sliced(tensor_of(weight)):
                return f"{node.name} is in tiles of float32 already; cast before that."
            if ending(node) != ENDINGS:
                return f"{node.name} has taken in what follows it; cast before that."
        for parameter in stored(node):
            if parameter.op != "get_attr":
                return f"{node.name} reads {parameter.name}, which the graph computes: it is no stored parameter."
        for each in (node, *node.all_input_nodes):
            if writer := graphs.writer(each):
                return f"{writer.name} writes into {each.name} in place."
        device = node.meta["val"].device
        if node.target in onednn.FUSED:
            return onednn.why_not(torch.empty(0, dtype=self.low, device=device))
        if device.type not in ("cpu", "cuda"):
            return f"{self.name} is for cpu and cuda, and the graph is on {device}."
        reason = None if self.anyway else why_slow(self.low, device)
        return reason and f"{reason} It would be slower; anyway=True casts it all the same."

    def rewrite(self, graph: GraphModule, site: Site) -> list[tuple[str, Tensor]]:  # noqa: ARG002
        """Cast what it reads, once, and let what it returns be cast back as late as can be."""
        node = site.node
        replaced = lower_stored(node, self.low)
        read = dict.fromkeys(ATTENTIONS, node.args[:3]) | {kernels.LINEAR: node.args[:1]}
        inputs = read.get(node.target, node.all_input_nodes)
        for mask in node.all_input_nodes if node.target is ATTENTION else ():
            if (keep := boolean_of(mask)) is not None:
                node.replace_input_with(mask, keep)
        for source in dict.fromkeys(inputs):
            if isinstance(source, Node) and type_of(source) is HIGH:
                node.replace_input_with(source, cast_down(source, node, self.low))
        return replaced + self._sink(self._to_low(node))

    def undo(self, graph: GraphModule, memo: list[tuple[str, Tensor]]) -> None:
        """Put the tensors themselves back."""
        for name, tensor in memo:
            graphs.set_tensor(graph, name, tensor)

    def _to_low(self, node: Node) -> list[Node]:
        """Say that the node, whose inputs are cast, returns the lower type, and cast that back for all who read it."""
        self.mark_as_transformed(node)
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            node.meta["val"] = [each.to(self.low) for each in value]
            return [cast for part in list(node.users) for cast in self._to_low(part)]
        with node.graph.inserting_after(node):
            up = node.graph.call_function(CAST, (node, HIGH))
        up.meta["val"], node.meta["val"] = value, value.to(self.low)
        node.replace_all_uses_with(up, delete_user_cb=lambda user: user is not up)
        return [up]

    def _sink(self, casts: list[Node]) -> list[tuple[str, Tensor]]:
        """Move casts to float32 behind what can do without them; they end where they are needed, or go.

        Returns what was stored for those that can, by name, as it was.
        """
        replaced = list[tuple[str, Tensor]]()
        while casts:
            cast = casts.pop()
            source = cast.args[0]
            assert isinstance(source, Node)
            if (spelt := spelt_out(cast)) is not None and why_kept(spelt.nodes[-1], self.keep) is None:
                casts += self._to_low(as_operator(spelt))
            for user in list(cast.users):
                if is_cast(user, HIGH, self.low):
                    user.replace_all_uses_with(source)
                    user.graph.erase_node(user)
                elif (inputs := self._low_inputs(user)) is not None:
                    for high, low in inputs.items():
                        user.replace_input_with(high, low)
                    replaced += lower_stored(user, self.low)
                    casts += self._to_low(user)
            if not cast.users:
                cast.graph.erase_node(cast)
        return replaced

    def _low_inputs(self, node: Node) -> dict[Node, Node] | None:
        """What there is in the lower type of each float32 tensor that the node reads; None if it has to stay."""
        if node.target not in (*MOVES, *ROUNDS_ONCE) or why_kept(node, self.keep) or graphs.writer(node):
            return None
        parts = not isinstance(node.meta["val"], Tensor)
        if type_of(node) is not HIGH or (parts and any(user.target is not operator.getitem for user in node.users)):
            return None
        # A sum or product with a number is part of something longer, which would be rounded at each step.
        if node.target in SUMS_AND_PRODUCTS and len(node.all_input_nodes) < 2:
            return None
        if any(parameter.op != "get_attr" for parameter in stored(node)):
            return None
        # What a LayerNorm has stored is cast by itself, where it has to be.
        read = node.args[:1] if node.target is NORM else node.all_input_nodes
        sources = [each for each in read if isinstance(each, Node) and type_of(each) is HIGH]
        low = {each: known_low(each, node, self.low) for each in sources}
        return None if None in low.values() else {high: each for high, each in low.items() if each is not None}


class CastToBFloat16(Cast):
    """Linears and attention compute in bfloat16, and so does what lies between two of them.

        y = gelu(linear(x, W, b))            becomes        x' = to(x, bfloat16)
        z = linear(y, V, c)                                 y' = gelu(linear(x', W', b'))
                                                            z  = to(linear(y', V', c'), float32)

    Weights and biases are cast once and stored. A cast moves on, behind additions, activations and LayerNorms, until
    something needs float32, so that an encoder has one where it begins and one where it ends. Softmax inside of
    attention, and statistics of LayerNorms, are float32 all the same, and on a CPU so are LayerNorms' weights;
    attention that is written out stays in float32 as it is. `keep` lists what else does: words in the paths of layers
    or in the names of operators ("LayerNorm": what it reads and returns too), and "logits" for the linears that make
    the outputs. `leave` is the share of the other linears and attentions that does too: those that cost most when they
    alone are cast (see `sensitivity`, `calibration`), which one run for each finds out. A processor or GPU without
    bfloat16 would be slower: it is refused unless `anyway`, to measure what the answers lose.
    """

    low = torch.bfloat16


class CastToFloat16(Cast):
    """Linears and attention compute in float16, and so does what lies between two of them. For CUDA.

        y = gelu(linear(x, W, b))            becomes        x' = to(x, float16)
        z = linear(y, V, c)                                 y' = gelu(linear(x', W', b'))
                                                            z  = to(linear(y', V', c'), float32)

    All is as in `CastToBFloat16`, `keep` and `leave` too. float16 has three more bits for each number, and is as fast
    on a GPU; but what is beyond 65504 becomes infinite, and soon NaN. That may happen to what a linear reads or
    returns, to a product in a gated feed-forward, and to a residual that grows from layer to layer, as ModernBERT's;
    "layers.5" in `keep` leaves the layer that does it in float32. Scores of attention and what masks them are no
    danger: those are float32 inside of the operator, these boolean. What is not finite where the model is breaks the
    promise, so `verify` says so. What is below 3e-8 becomes 0. A CPU would be slower: it is refused unless `anyway`, to
    measure what the answers lose.
    """

    low = torch.float16


def why_slow(low: torch.dtype, device: torch.device) -> str | None:
    """Why a CPU or CUDA device computes no faster in this type than in float32, if so."""
    if device.type == "cpu":
        if low is torch.float16:
            return "float16 is a type for GPUs, which few CPUs compute in."
        return onednn.why_not(torch.empty(0, dtype=low))
    if low is torch.float16:
        return None
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return None
    version = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return (
        f"{torch.cuda.get_device_name(device)} has no bfloat16: its compute capability is {version}, not 8.0 or more."
    )
