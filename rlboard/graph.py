"""A module's graph for TensorBoard's Graphs tab, read off one real forward pass.

`graph_def` runs the model once and writes down every ATen operator as it is dispatched, in the scope of the module that
called it. Nothing is traced, scripted or compiled, so whatever runs can be drawn, control flow that depends on the data
included, and the parameters, buffers, modes and random numbers of the run are the same afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from types import FrameType
from typing import Any

import torch
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.versions_pb2 import VersionDef
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)

Output = tuple[int, int]
"""A tensor's place in the graph: which node made it, and as which of its outputs."""


def graph_def(model: nn.Module, inputs: Any) -> GraphDef:
    """Returns the operators of `model(*inputs)` in scopes like `ResNet/Sequential[layer1]/BasicBlock[0]/Conv2d[conv1]`.

    The pass runs in evaluation mode without gradients and keeps all its activations until it ends. State that a model
    keeps outside its buffers, in plain Python attributes, is not put back.

    Args:
        model: any module, on any device; shared modules get one scope for each call.
        inputs: the positional arguments of `model` as a tuple or list; anything else is its only argument.

    Raises:
        ValueError: the model has lazy parameters, which this pass would initialize.
        Exception: whatever the model raises.
    """
    if any(isinstance(tensor, UNINITIALIZED) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model has uninitialized lazy parameters: run one batch through it first")
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    named_arguments = inspect.signature(model.forward).bind(*arguments).arguments
    recorder = _Recorder(model)
    with undisturbed(model, arguments), recorder.following_modules(model), recorder:
        for name, tensor in _named_tensors(named_arguments):
            recorder.add_input(name, tensor)
        outputs = model(*arguments)
        for name, tensor in _named_tensors({"output": outputs}):
            recorder.add_output(name, tensor)
    return recorder.graph_def()


def module_tree(model: nn.Module) -> str:
    """Returns the modules of `model` as a nested Markdown list with the number of parameters of each."""
    return "\n".join(_tree_lines(model, type(model).__name__, ""))


def _tree_lines(module: nn.Module, name: str, indent: str) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in module.parameters() if not isinstance(parameter, UNINITIALIZED))
    children = list(module.named_children())
    details = type(module).__name__ if children else f"{type(module).__name__}({module.extra_repr()})"
    yield f"{indent}- **{name}** `{details}` {parameters:,} parameters"
    for child_name, child in children:
        yield from _tree_lines(child, child_name, indent + "    ")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns every operator dispatched on this thread into a node."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[NodeDef] = []
        self.names: set[str] = set()
        self.name_counts: Counter[str] = Counter()
        self.producers: dict[int, Output] = {}  # by id(tensor)
        self.writers: dict[int, Output] = {}  # by storage: the last in-place write through any of its views
        self.alive: list[object] = []  # every tensor seen, so that no id is given twice
        self.thread = threading.get_ident()

        self.scopes: dict[nn.Module, str] = {}
        self.parameters: dict[int, str] = {}
        for path, module in model.named_modules():
            parent, _, name = path.rpartition(".")
            scope = type(module).__name__
            if path:
                scope = f"{self.scopes[model.get_submodule(parent)]}/{scope}[{_clean(name)}]"
            self.scopes[module] = scope
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                self.parameters.setdefault(id(tensor), f"{scope}/{_clean(name)}")
        # One entry a running call: the scope of its module, and the scope of this very call.
        self.calls: list[tuple[str, str]] = [(self.scopes[model], self.scopes[model])]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from importing its compiler, 2 s of CPU, only to keep it away from `__torch_dispatch__`."""
        return False

    @contextlib.contextmanager
    def following_modules(self, model: nn.Module) -> Iterator[None]:
        """Keeps `calls` up to date while the modules of `model` run."""
        hooks = []
        for module in model.modules():
            hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, arguments: object) -> None:  # noqa: ARG002  the hook's signature
        if threading.get_ident() != self.thread:
            return
        outer_scope, outer_call = self.calls[-1]
        call = scope = self.scopes[module]
        if scope.startswith(outer_scope + "/"):
            call = outer_call + scope.removeprefix(outer_scope)
        self.calls.append((scope, self._unique(call)))

    def _leave(self, module: nn.Module, arguments: object, output: object) -> None:  # noqa: ARG002
        if threading.get_ident() == self.thread:
            self.calls.pop()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        self.alive.append((args, kwargs, results))
        inputs = [self._read(tensor) for _, tensor in _named_tensors([args, kwargs])]

        schema = getattr(func, "_schema", None)  # higher-order operators have none
        declared = schema.arguments if schema else []
        given = [*zip(declared, args, strict=False), *((d, kwargs[d.name]) for d in declared if d.name in kwargs)]
        attributes = {
            argument.name: str(value)
            for argument, value in given
            if value is not None and not any(_named_tensors(value))
        }
        if source := _source_line(sys._getframe(1)):
            attributes["source"] = source

        operator = func.name().partition(".")[0]  # type: ignore[attr-defined]
        tensors = [tensor for _, tensor in _named_tensors(results)]
        leaf = operator.rpartition("::")[2]
        node = self._add(f"{self.calls[-1][1]}/{leaf}", operator, inputs, tensors, attributes)
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for _, tensor in _named_tensors(value):
                    self.writers[_storage(tensor)] = (node, 0)
        return results

    def add_input(self, name: str, tensor: Tensor) -> None:
        self.alive.append(tensor)
        self._add(f"input/{name}", "IO Node", [], [tensor], {})

    def add_output(self, name: str, tensor: Tensor) -> None:
        self.alive.append(tensor)
        source = self._read(tensor)
        self._add(f"output/{name}", "IO Node", [source], [tensor], {})

    def graph_def(self) -> GraphDef:
        """Returns the graph without the scratch buffers that kernels allocate and never read."""
        used = {source.partition(":")[0] for node in self.nodes for source in node.input}
        nodes = [node for node in self.nodes if "::" not in node.op or node.input or node.name in used]
        return GraphDef(node=nodes, versions=VersionDef(producer=22))

    def _read(self, tensor: Tensor) -> str:
        """Returns where `tensor` comes from as TensorBoard writes it; what was never seen becomes a node of its own."""
        if id(tensor) not in self.producers:
            if id(tensor) in self.parameters:
                self._add(self.parameters[id(tensor)], "Parameter", [], [tensor], {})
            else:
                self._add(f"{self.calls[-1][1]}/constant", "Const", [], [tensor], {})
        node, output = max(self.producers[id(tensor)], self.writers.get(_storage(tensor), (-1, 0)))
        name = self.nodes[node].name
        return f"{name}:{output}" if output else name

    def _add(
        self, name: str, operator: str, inputs: list[str], outputs: list[Tensor], attributes: dict[str, str]
    ) -> int:
        """Appends a node that makes `outputs` and returns its index."""
        node = NodeDef(name=self._unique(name), op=operator, input=inputs)
        for key, text in attributes.items():
            node.attr[key].s = text.encode(errors="replace")[:500]
        if outputs:
            node.attr["dtype"].s = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in outputs).encode()
            node.attr["_output_shapes"].list.shape.extend(map(_shape, outputs))
        self.nodes.append(node)
        index = len(self.nodes) - 1
        for position, tensor in enumerate(outputs):
            self.producers[id(tensor)] = (index, position)
        return index

    def _unique(self, name: str) -> str:
        while True:
            count = self.name_counts[name]
            self.name_counts[name] += 1
            candidate = f"{name}_{count}" if count else name
            if candidate not in self.names:
                self.names.add(candidate)
                return candidate


@contextlib.contextmanager
def undisturbed(model: nn.Module, arguments: tuple[Any, ...]) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards whatever a forward pass on `arguments` could change is put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    mutable = [buffer for _, _, buffer in buffers] + [tensor for _, tensor in _named_tensors(arguments)]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), torch.random.fork_rng(**_generators([*model.parameters(), *mutable])), _uncompiled():
        saved = [tensor.clone() for tensor in mutable]
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # or all of attention is one opaque operator
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)
            for module, training in modes:
                module.training = training
            for module, name, buffer in buffers:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
            for tensor, before in zip(mutable, saved, strict=True):
                if not tensor.is_meta and not torch.equal(tensor, before):
                    tensor.copy_(before)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Has compiled functions run as they are written; whoever has compiled any has imported the compiler."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _generators(tensors: list[Tensor]) -> dict[str, Any]:
    """Returns the arguments by which `torch.random.fork_rng` saves the generators of the devices in use."""
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    return {"devices": devices, "device_type": next((device.type for device in devices), None)}


def _named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor within nested tuples, lists and mappings, under the keys and positions that lead to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_tensors(item, f"{name}/{_clean(str(key))}" if name else _clean(str(key)))
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from _named_tensors(item, f"{name}/{position}" if name else str(position))


def _clean(name: str) -> str:
    """Returns `name` without the signs that mean scope, output and control edge in a GraphDef."""
    return re.sub(r"[/:^]", "_", name)


def _shape(tensor: Tensor) -> TensorShapeProto:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in tensor.shape])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _source_line(frame: FrameType | None) -> str:
    """Returns file, line number and text of the innermost line that is the model's own and not torch's."""
    while frame is not None and frame.f_code is not graph_def.__code__:
        module = frame.f_globals.get("__name__", "")
        if module != "torch" and not module.startswith("torch."):
            file = frame.f_code.co_filename
            text = linecache.getline(file, frame.f_lineno, frame.f_globals).strip()
            return f"{PurePath(file).name}:{frame.f_lineno} {text}"
        frame = frame.f_back
    return ""
