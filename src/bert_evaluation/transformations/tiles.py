"""Linears and attention on our own kernels, which compute them tile by tile."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import kernels, varlen
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.heads import SDPA, RefusedError, call, drop, heads_at
from bert_evaluation.transformations.linear import (
    free_name,
    readers,
    sites_by_weight,
    stem,
    tensor_of,
    weight_and_bias,
    written_between,
)
from bert_evaluation.transformations.padding_mask import boolean_of
from bert_evaluation.transformations.positions import shape

aten = torch.ops.aten
# What a linear in tiles can end with, in the order in which it is computed, and what stands for none of it.
ENDINGS = {"activation": "none", "residual": None, "norm_weight": None, "norm_bias": None, "eps": 0.0}
FIXED = 5  # arguments in front of those


class TileLinears(ReversibleTransformation):
    """Linears become the operator of our own kernels, with weights in the order in which it reads them.

        y = linear(x, W, b)        becomes        y = bert_evaluation.linear(x, packed W, None, b, outputs)

    In bfloat16 or float32; the bias is float32, and so are sums. The packed weight takes the place of the plain one,
    and as much memory. What follows can go into the operator: `FuseLinearActivation`, `FuseResidual`,
    `FuseSkipLayerNorm`. A processor without kernels is refused unless `anyway`: then in plain PyTorch, slowly. A site
    is one weight, wherever applied.

    On AMX, which has no float32, that is multiplied as whole numbers: each row of x, and each output's weights, in
    fixed point of 24 bits, in three slices of 8. Products of slices and their sums are exact (Ozaki et al., 2012,
    doi:10.1007/s11075-011-9478-1; on integers Ootomo, Ozaki and Yokota, 2024, arXiv:2306.11975); eight of the nine are
    computed, since the last is below the last bit. Each number is rounded to 2^-24 of the largest of its row, where
    float32 rounds each sum to 2^-24 of itself. By the bounds of both the error is no larger from 12 inputs on:
    |x| |w| 2^-23 (√inputs + 2) against |x| |w| 2^-24 inputs. These weights take three quarters of the memory, beside
    the plain ones that undoing needs. Where a saved graph is read without AMX, they are numbers of float32 again.
    """

    promise = Reassociates()

    def __init__(self, anyway: bool = False) -> None:
        self.anyway = anyway

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear, those that share their weight together."""
        return sites_by_weight(graph)

    def why_not(self, site: Site) -> str | None:
        """Refuse what is fused or packed, what others read too, other types, and a machine without kernels."""
        if fused := next((node for node in site.nodes if node.target is not aten.linear.default), None):
            return f"{fused.name} is fused or packed for oneDNN already."
        for parameter in (each for node in site.nodes for each in weight_and_bias(node) if each is not None):
            if parameter.op != "get_attr":
                return f"{site.node.name} reads {parameter.name}, which the graph computes: it is no stored parameter."
        weight = weight_and_bias(site.node)[0]
        if reader := next((user for user in readers(weight) if user not in site.nodes), None):
            return f"{weight.target} is also read by {reader.name}, which would keep the old copy."
        tensor = tensor_of(weight)
        if tensor.dtype not in (torch.bfloat16, torch.float32):
            return f"It computes in {tensor.dtype}; the kernels are for bfloat16, int8 and float32."
        reason = kernels.why_not(tensor.dtype, tensor.device)
        return None if self.anyway else reason

    def rewrite(self, graph: GraphModule, site: Site) -> "_Packed":
        """Pack the weight, and let every linear read it."""
        weight = weight_and_bias(site.node)[0]
        tensor, name = tensor_of(weight), free_name(graph, stem(weight) + "_tiles", "weight")
        module = name.removesuffix(".weight")
        sliced = _in_slices(tensor)
        if sliced:
            packed, scales = kernels.slice_up(tensor.detach())
            graphs.set_tensor(graph, f"{module}.scales", scales)
        else:
            packed = kernels.pack(tensor.detach())
        graphs.set_tensor(graph, name, packed)
        biases = dict[str, Tensor]()
        for number, linear in enumerate(site.nodes):
            bias = weight_and_bias(linear)[1]
            with graph.graph.inserting_before(linear):
                wide = None
                if bias is not None:
                    biases[str(bias.target)] = tensor_of(bias)
                    target = f"{module}.bias" + (f"_{number}" if number else "")
                    graphs.set_tensor(graph, target, tensor_of(bias).detach().float())
                    wide = graph.graph.get_attr(target)
                worth = graph.graph.get_attr(f"{module}.scales") if sliced else None
                read = (linear.args[0], graph.graph.get_attr(name), worth, wide, len(tensor))
                fused = graph.graph.call_function(kernels.LINEAR, read)
            fused.meta["val"] = linear.meta["val"]
            linear.replace_all_uses_with(fused)
            graph.graph.erase_node(linear)
        kept = biases | {str(weight.target): tensor} if sliced else biases
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        return _Packed(str(weight.target), name, kept, tensor.shape, is_parameter, tensor.requires_grad)

    def undo(self, graph: GraphModule, memo: "_Packed") -> None:
        """Bring the weight back into its own order; in slices, put it back itself."""
        if memo.plain not in memo.kept:
            packed = graphs.get_tensor(graph, memo.packed)
            assert packed is not None
            tensor = kernels.unpack(packed, *memo.shape)
            if memo.is_parameter:
                tensor = torch.nn.Parameter(tensor, requires_grad=memo.trained)
            graphs.set_tensor(graph, memo.plain, tensor)
        for target, each in memo.kept.items():
            graphs.set_tensor(graph, target, each)


def _in_slices(weight: Tensor) -> bool:
    fits = weight.dtype is torch.float32 and weight.shape[1] <= kernels.LONGEST_SLICED
    return fits and kernels.multiplies_slices(weight.device)


@dataclass(frozen=True)
class _Packed:
    """A weight that was packed: its names before and after, what is kept as it was, by name, and what it was."""

    plain: str
    packed: str
    kept: dict[str, Tensor]
    shape: torch.Size
    is_parameter: bool
    trained: bool


class TileAttention(ReversibleTransformation):
    """Attention becomes the operator of our own kernels, which reads and writes what heads are parts of.

        q, k, v = (transpose(view(x, heads)) for x in (q', k', v'))
        a = scaled_dot_product_attention(q, k, v, mask)       becomes      y = bert_evaluation.attention(
        y = reshape(transpose(a))                                              q', k', v', mask, heads, scale)

    So is that of sequences without padding (`RemovePadding`), which on a GPU has a kernel anyway. The mask, of any
    shape, is boolean or made of a boolean one. In bfloat16; with AVX2 alone also in float32, on a GPU in float16.
    """

    promise = Reassociates()

    def __init__(self, anyway: bool = False) -> None:
        self.anyway = anyway

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every scaled_dot_product_attention, and every attention of packed sequences."""
        return [Site(node) for node in graph.graph.nodes if node.target in (SDPA, varlen.ATTENTION)]

    def why_not(self, site: Site) -> str | None:
        """Refuse other types, masks of numbers, queries of other sequences, and a machine without kernels."""
        value = site.node.meta["val"]
        if site.node.target is varlen.ATTENTION:
            if value.is_cuda:
                return "On a GPU attention of packed sequences has a kernel already."
            heads, sources = site.node.args[5], site.node.args[:3]
        else:
            try:
                found = heads_at(site.node)
            except RefusedError as refusal:
                return str(refusal)
            if found.mask is not None and _boolean(found.mask) is None:
                return f"{found.mask.name} is added to the scores; the kernels take a boolean mask."
            heads, sources = found.heads, tuple(split.args[0] for split in found.splits)
        shapes = {tuple(map(str, shape(each))) for each in sources if isinstance(each, Node)}
        if len(shapes) > 1:
            return "Query, key and value differ in shape."
        assert isinstance(heads, int)
        assert isinstance(sources[0], Node)
        width = shape(sources[0])[2]
        if not isinstance(width, int):
            return "The width of a head is not known."
        reason = kernels.why_no_attention(value.dtype, width // heads, value.device)
        may = value.dtype in kernels.TYPES_OF_ATTENTION["cpu"] and not width // heads % 2
        return None if self.anyway and may else reason

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Put the operator where the heads were joined."""
        node = site.node
        if node.target is varlen.ATTENTION:
            *arguments, offsets, _, heads, scale = node.args
            assert isinstance(offsets, Node)
            arguments.append(offsets.args[0])  # the mask that they were made of
            result, target, old = node, kernels.PACKED_ATTENTION, {node}
        else:
            found = heads_at(node)
            mask = None if found.mask is None else _boolean(found.mask)
            arguments = [*(split.args[0] for split in found.splits), mask]
            heads, scale, result, target = found.heads, found.scale, found.result, kernels.ATTENTION
            old = {*found.inner, result}
        assert isinstance(heads, int)
        with graph.graph.inserting_before(result):
            factor = (int(shape(result)[2]) // heads) ** -0.5 if scale is None else scale
            tiled = call(target, (*arguments, heads, factor), node, result.meta["val"])
        result.replace_all_uses_with(tiled)
        drop(graph.graph, old)


def _boolean(mask: Node) -> Node | None:
    return mask if mask.meta["val"].dtype is torch.bool else boolean_of(mask)


def ending(linear: Node) -> dict[str, Any]:
    """What a linear in tiles ends with, by the arguments' names."""
    return ENDINGS | dict(zip(ENDINGS, linear.args[FIXED:], strict=False)) | linear.kwargs


def with_ending(linear: Node, **more: Any) -> tuple[Any, ...]:
    """The arguments of a linear in tiles that ends with this as well."""
    return (*linear.args[:FIXED], *(ending(linear) | more).values())


def why_not_ended(linear: Node, last: Sequence[Node], what: str) -> str | None:
    """Why a linear in tiles cannot end with what `last`, first to last, make of it; `what` names the argument."""
    names = list(ENDINGS)
    if taken := next((each for each in names[names.index(what) :] if ending(linear)[each] != ENDINGS[each]), None):
        return f"{linear.name} ends with {taken.replace('_', ' ')} already, which comes later or is the same."
    if outside := next((user for user in linear.users if user not in last), None):
        return f"{linear.name} is also read by {outside.name}."
    if writer := written_between(linear, last[-1]):
        return f"{writer.name} writes in place between them."
    return None
