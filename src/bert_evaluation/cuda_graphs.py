"""A function recorded as CUDA graphs: one launch for all kernels of a call, instead of one each from Python.

A CUDA graph works on the addresses and sizes that it was recorded with. So there is one for each bucket of shapes, with
inputs of its own, into which those of a call are copied, and out of whose outputs the results are cut.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import varlen
from bert_evaluation.buckets import bucket
from bert_evaluation.errors import TransformationError
from bert_evaluation.graph import GraphModule
from bert_evaluation.signature import Signature, Sizes

# Of more tokens than these each kernel is at work for longer than it takes to launch the next one: there is nothing to
# be won, and what is rounded up costs.
LARGE = 8192
LIMIT = 64  # recordings that are kept; each has its inputs and outputs, and what the driver takes for it
WARM_UP = 3  # calls in front of a recording, in which kernels are loaded and libraries make their workspaces
Key = tuple[int, ...]
_RECORDING = threading.Lock()  # CUDA records one graph at a time in a process


def why_not(graph: GraphModule) -> str | None:
    """Why the calls of a graph cannot be recorded, if that is known; if not, the first call tells."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.device.type != "cuda":
            return f"CUDA graphs are for cuda, and the graph is on {value.device}; apply Compile() without cuda_graphs."
        if node.target is varlen.PLACES:
            return (
                f"{node.name} waits for the device to count its tokens, and what waits cannot be recorded;"
                " apply Compile() without cuda_graphs, or leave RemovePadding out."
            )
    return None


class Recorder(Protocol):
    """What records the work that a call gives a device."""

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return what does the call's work again, and what the call returned, into which that work writes."""

    def follow(self) -> None:
        """Let what the current stream is given from here on wait for what was replayed before, on any stream."""


class CudaRecorder:
    """Records CUDA graphs on a stream of its own, all in one pool of memory: no two of them may run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, torch.cuda.current_stream(device)
        self._begin()

    def _begin(self) -> None:
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Call it a few times, and once more to record it. Other threads may use the device, but not wait for it."""
        graph, reason = torch.cuda.CUDAGraph(), None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with _RECORDING, torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                call()
            # A recording keeps its own memory, but not the workspace that cuBLAS was given before it. That one may go:
            # CUDA graphs of torch.compile's own, made in the same process, free it.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # It waits for the device first: what was replayed before has ended, and may be forgotten after.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    try:
                        outputs = call()
                    except Exception as error:
                        reason = error
                        raise
            except Exception as error:
                self._begin()  # stream and pool of a recording that failed may be of no use any more
                # What ends such a recording raises an error of its own, which says nothing about the reason.
                raise reason or error from error
        return graph.replay, outputs

    def follow(self) -> None:
        """Streams are in order by themselves: there is something to wait for where another one is used."""
        current = torch.cuda.current_stream(self._device)
        if current != self._last:
            current.wait_stream(self._last)
            self._last = current


class Replayed:
    """A function of tensors by name, called by replaying what was recorded; from any number of threads, one at a time.

    `most` says which sizes are rounded up, so that shapes share a recording, and how far; `limit` is how many of those
    are kept: the one that was not used for longest goes. Outputs are the caller's own. Large inputs are not recorded.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        signature: Signature,
        most: Mapping[str, int],
        recorder: Recorder,
        limit: int = LIMIT,
    ) -> None:
        self._function, self._signature, self._most = function, signature, most
        self._recorder, self._limit = recorder, limit
        self._recordings = OrderedDict[Key, _Recording]()
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Any:
        """What the function returns for inputs of these sizes. Raises TransformationError if it cannot be recorded."""
        if math.prod(sizes.values()) > LARGE:
            return self._function(**inputs)
        whole = bucket(sizes, self._most)
        key = tuple(whole.values())
        with self._lock:
            self._recorder.follow()
            recording = self._recordings.get(key)
            if recording is None:
                recording = self._recordings[key] = self._recorded(whole)
                if len(self._recordings) > self._limit:
                    self._recordings.popitem(last=False)
            self._recordings.move_to_end(key)
            return recording(inputs, sizes)

    def _recorded(self, whole: Mapping[str, int]) -> "_Recording":
        try:
            return _Recording(self._function, self._signature, whole, self._recorder)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise TransformationError(
                f"This graph cannot be recorded as a CUDA graph ({said[0]}); apply Compile() without cuda_graphs."
            ) from error


class _Recording:
    """One recording with its inputs and outputs; `whole` are the sizes of those."""

    def __init__(
        self, function: Callable[..., Any], signature: Signature, whole: Mapping[str, int], recorder: Recorder
    ) -> None:
        self._signature, self._whole = signature, whole
        # As inference tensors they could be written into in inference mode only.
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = {each.name: each.zeros(whole) for each in signature.inputs}
            self._replay, returned = recorder.record(lambda: function(**self._inputs))
        self._outputs, self._as_returned = graphs.taken_apart(returned)
        self._windows = dict[Key, _Window]()
        self._last: _Window | None = None

    def __call__(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Any:
        """Copy inputs in, padding behind them, replay, and copy what is returned for them out."""
        key = tuple(sizes.values())
        window = self._windows.get(key) or self._windows.setdefault(key, self._window(sizes))
        if window is not self._last and window.leaves_padding:
            for tensor in self._inputs.values():
                tensor.zero_()
        self._last = window
        for name, tensor in window.inputs.items():
            tensor.copy_(inputs[name])
        self._replay()
        return self._as_returned([part.clone() if isinstance(part, Tensor) else part for part in window.outputs])

    @torch.inference_mode(False)
    def _window(self, sizes: Mapping[str, int]) -> "_Window":
        named = self._signature.outputs
        # Where they are not understood nothing is rounded up, and nothing has to be cut.
        cuts = named if len(named) == len(self._outputs) else [()] * len(self._outputs)
        return _Window(
            {each.name: _cut(self._inputs[each.name], each.sizes, sizes) for each in self._signature.inputs},
            [_cut(part, cut, sizes) if cut else part for part, cut in zip(self._outputs, cuts, strict=True)],
            sizes != self._whole,
        )


@dataclass(frozen=True)
class _Window:
    """Where the inputs and outputs of a call are, within those of a recording."""

    inputs: Mapping[str, Tensor]
    outputs: Sequence[Any]
    leaves_padding: bool


def _cut(tensor: Tensor, named: Sizes, sizes: Mapping[str, int]) -> Tensor:
    """What a tensor has within these sizes."""
    for dimension, name in enumerate(named):
        if isinstance(name, str) and name in sizes:
            tensor = tensor.narrow(dimension, 0, sizes[name])
    return tensor
