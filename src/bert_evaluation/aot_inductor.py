"""A graph as a shared library, by AOTInductor: a call of it is one call from Python, with nothing but the inputs.

torch.compile asks at each call whether its code fits, and hands over every parameter: a tenth of a millisecond, in
which a small model could have answered. A library knows where the parameters of its graph lie.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package  # documented, under this name
from torch.export import Dim

from bert_evaluation import extension, hashes, kernels
from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule

SOURCES = ("aot_inductor.cpp", "aot_inductor_shims.cpp")
# The loader of torch 2.11 ended the process on a machine with a GPU, and keeps to itself what an operator of ours says.
LOWEST = "2.13"
MOST = 32  # graphs that are kept compiled, some megabytes each: those that were used last
# How a C function takes what an operator takes.
IN_C = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "int": "int64_t",
    "str": "const char*",
    "float": "double",
    "List[Optional[Tensor]]": "const AtenTensorHandle**",
    "List[int]": "const int64_t*",
    "List[float]": "const double*",
}


def is_there() -> bool:
    """Whether this torch has what libraries need."""
    return bool(torch.__version__ >= LOWEST)  # as versions are ordered


def takes(graph: GraphModule) -> bool:
    """Whether a library can be made of a graph: not of weights that oneDNN has packed, which lie in no strides."""
    return is_there() and all(each.layout is torch.strided for each in graphs.tensors(graph).values())


@cache
def why_not_built() -> str | None:
    """Compile and load what libraries need, unless that is done; why that failed, if it did (see `extension`)."""
    return extension.why_not_loaded("libraries", Path(__file__).parent, SOURCES, ["-O2", "-std=c++20"])


def config() -> dict[str, Any]:
    """Parameters stay where they are, and our operators are called as the C functions in `aot_inductor_shims.cpp`."""
    shims = {operator: [_declaration(operator)] for operator in kernels.TWINS}
    return {"aot_inductor.package_constants_in_so": False, "aot_inductor.custom_ops_to_c_shims": shims}


def _declaration(operator: torch._ops.OpOverload) -> str:
    taken = list[str]()
    for each in operator._schema.arguments:
        taken.append(f"{IN_C[str(each.type)]} {each.name}")
        if str(each.type).startswith("List"):
            taken.append(f"int64_t {each.name}_size")
    name = operator._schema.name.rpartition("::")[2]
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join(taken)}, AtenTensorHandle* result)"


def library(
    graph: GraphModule, examples: Mapping[str, Tensor], dynamic: Mapping[str, list[int]], options: Mapping[str, Any]
) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """What returns the tensors that a graph returns, one after the other; Inductor gets these options.

    `examples` are inputs, and `dynamic` says which of their dimensions may have other sizes. Inputs are read as they
    lie: contiguous, and of the types of the examples. The tensors that the graph has now are read at every call, but
    for the smallest, up to 8 numbers, which Inductor may write into its code. That is kept in the cache folder (see
    `extension`), so that the same graph is not compiled again.

    Raises RuntimeError without a compiler, and what torch raises, as if a dimension has to be as it is in the examples.
    """
    if (reason := why_not_built()) is not None:
        raise RuntimeError(reason)
    package = extension.cache_folder() / f"graph-{_key(graph, examples, dynamic, options)}.pt2"
    if package.exists():
        package.touch()
    else:
        _compile(graph, examples, dynamic, options, package)
    tensors = graphs.tensors(graph)
    # What is loaded is unpacked into a folder for temporary files, which goes with it.
    made = torch.classes.bert_evaluation.Library(str(package), os.cpu_count())
    made.read({name: tensors[name] for name in made.names()})
    return lambda inputs: made.run([inputs[name] for name in examples])


def _key(graph: GraphModule, examples: Mapping[str, Tensor], *others: Mapping[str, Any]) -> str:
    taken = [f"{name} {each.dtype} {tuple(each.shape)}" for name, each in examples.items()]
    strided = {name: each.stride() for name, each in graphs.tensors(graph).items()}
    about = [hashes.graph_hash(graph), hashes.constants_hash(graph), *taken, *map(str, (strided, *others, config()))]
    return hashlib.sha256("\n".join([*about, *extension.about_this_machine()]).encode()).hexdigest()[:16]


def _compile(
    graph: GraphModule,
    examples: Mapping[str, Tensor],
    dynamic: Mapping[str, list[int]],
    options: Mapping[str, Any],
    package: Path,
) -> None:
    shapes = {name: dict.fromkeys(dynamic[name], Dim.DYNAMIC) for name in examples}
    exported = torch.export.export(graph, (), dict(examples), dynamic_shapes=shapes)
    package.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.parent) as place:  # so that nobody finds half of it
        made = aoti_compile_and_package(
            exported, package_path=str(Path(place, "graph.pt2")), inductor_configs={**config(), **options}
        )
        os.replace(made, package)
    kept = sorted(package.parent.glob("graph-*.pt2"), key=lambda each: each.stat().st_mtime)
    for each in kept[:-MOST]:
        each.unlink(missing_ok=True)
