"""What a recorded graph shows, and that recording one leaves no trace in the model or its training."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rlboard.eventfile import EventFile
from rlboard.graph import graph_def, module_tree
from tests.browser import chromium, tensorboard

torchvision = pytest.importorskip("torchvision")


class SimpleCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(16 * 8 * 8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = max_pool2d(relu(self.conv1(images)), 2)
        features = max_pool2d(relu(self.conv2(features)), 2)
        return self.head(self.dropout(features.flatten(1)))  # type: ignore[no-any-return]


def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 2), nn.Softmax(dim=-1))


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.ConvTranspose2d(8, 16, 4, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1, bias=False),
            nn.Tanh(),
        )


class Discriminator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(16, 1, 4, bias=False),
            nn.Flatten(0),
        )


def small_vit() -> nn.Module:
    """Returns ViT-B/16 in everything but its sizes."""
    return torchvision.models.VisionTransformer(  # type: ignore[no-any-return]
        image_size=32, patch_size=16, num_layers=12, num_heads=12, hidden_dim=24, mlp_dim=48
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "policy": (policy, torch.zeros(1, 4)),
    "cnn": (SimpleCNN, torch.zeros(2, 3, 32, 32)),
    "resnet18": (torchvision.models.resnet18, torch.zeros(1, 3, 32, 32)),
    "generator": (Generator, torch.zeros(2, 8, 1, 1)),
    "discriminator": (Discriminator, torch.zeros(2, 3, 8, 8)),
    "vit": (small_vit, torch.zeros(1, 3, 32, 32)),
}


class Function(nn.Module):
    """A module of a function, one parameter and a submodule."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, *arguments: Any) -> Any:
        return self.function(self, *arguments)


def checked(graph: GraphDef) -> dict[str, NodeDef]:
    """Returns the nodes by name after seeing that names are unique and that every edge starts at an earlier output."""
    outputs: dict[str, int] = {}
    for node in graph.node:
        assert node.name not in outputs
        for source in node.input:
            name, _, index = source.partition(":")
            assert int(index or 0) < outputs[name], f"{source} of {node.name}"
        outputs[node.name] = len(shapes(node))
    scopes = {name.rpartition("/")[0] for name in outputs}
    assert not scopes & outputs.keys(), "a node is a scope as well"
    return {node.name: node for node in graph.node}


def shapes(node: NodeDef) -> list[tuple[int, ...]]:
    return [tuple(dimension.size for dimension in shape.dim) for shape in node.attr["_output_shapes"].list.shape]


def operators(nodes: dict[str, NodeDef]) -> Counter[str]:
    return Counter(node.op for node in nodes.values())


def ancestors(nodes: dict[str, NodeDef], name: str) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        for source in nodes[todo.pop()].input:
            parent = source.partition(":")[0]
            if parent not in found:
                found.add(parent)
                todo.append(parent)
    return found


def test_the_policy_node_by_node() -> None:
    nodes = checked(graph_def(policy(), torch.zeros(5, 4)))
    assert {name: (node.op, list(node.input), shapes(node)) for name, node in nodes.items()} == {
        "input/input": ("IO Node", [], [(5, 4)]),
        "Sequential/Linear[0]/weight": ("Parameter", [], [(128, 4)]),
        "Sequential/Linear[0]/t": ("aten::t", ["Sequential/Linear[0]/weight"], [(4, 128)]),
        "Sequential/Linear[0]/bias": ("Parameter", [], [(128,)]),
        "Sequential/Linear[0]/addmm": (
            "aten::addmm",
            ["Sequential/Linear[0]/bias", "input/input", "Sequential/Linear[0]/t"],
            [(5, 128)],
        ),
        "Sequential/ReLU[1]/relu": ("aten::relu", ["Sequential/Linear[0]/addmm"], [(5, 128)]),
        "Sequential/Linear[2]/weight": ("Parameter", [], [(2, 128)]),
        "Sequential/Linear[2]/t": ("aten::t", ["Sequential/Linear[2]/weight"], [(128, 2)]),
        "Sequential/Linear[2]/bias": ("Parameter", [], [(2,)]),
        "Sequential/Linear[2]/addmm": (
            "aten::addmm",
            ["Sequential/Linear[2]/bias", "Sequential/ReLU[1]/relu", "Sequential/Linear[2]/t"],
            [(5, 2)],
        ),
        "Sequential/Softmax[3]/_softmax": ("aten::_softmax", ["Sequential/Linear[2]/addmm"], [(5, 2)]),
        "output/output": ("IO Node", ["Sequential/Softmax[3]/_softmax"], [(5, 2)]),
    }
    assert nodes["Sequential/Softmax[3]/_softmax"].attr["dim"].s == b"-1"
    assert nodes["input/input"].attr["dtype"].s == b"float32"


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_that_is_used_leads_to_the_output(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    nodes = checked(graph_def(model, inputs))
    used = ancestors(nodes, "output/output")
    parameters = {node_name for node_name, node in nodes.items() if node.op == "Parameter"}
    assert parameters <= used
    counted = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.ndim)]  # not num_batches_tracked
    assert len(parameters) == len(counted)
    assert {source for source in nodes if source.startswith("input/")} <= used
    assert all(name.startswith((f"{type(model).__name__}/", "input/", "output/")) for name in nodes)


def test_resnet18_has_its_blocks_convolutions_and_shortcuts() -> None:
    nodes = checked(graph_def(torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64)))
    counts = operators(nodes)
    assert counts["aten::convolution"] == 20
    assert counts["aten::relu_"] == 17
    assert counts["aten::empty"] == 0, "scratch buffers that nothing reads are left out"
    block = "ResNet/Sequential[layer1]/BasicBlock[1]"
    assert list(nodes[f"{block}/add_"].input) == [
        f"{block}/BatchNorm2d[bn2]/native_batch_norm",
        "ResNet/Sequential[layer1]/BasicBlock[0]/ReLU[relu]_1/relu_",
    ]
    convolution = nodes["ResNet/Conv2d[conv1]/convolution"]
    assert shapes(convolution) == [(1, 64, 32, 32)]
    assert convolution.attr["stride"].s == b"[2, 2]"
    assert convolution.attr["padding"].s == b"[3, 3]"
    assert convolution.attr["source"].s.startswith(b"resnet.py:")
    assert convolution.attr["source"].s.endswith(b"x = self.conv1(x)")


def test_the_attention_of_a_transformer_is_visible() -> None:
    nodes = checked(graph_def(small_vit(), torch.zeros(1, 3, 32, 32)))
    attention = [name for name in nodes if "scaled_dot_product" in name]
    assert len(attention) == 12
    assert attention[3].startswith(
        "VisionTransformer/Encoder[encoder]/Sequential[layers]/EncoderBlock[encoder_layer_3]"
        "/MultiheadAttention[self_attention]/"
    )


@pytest.mark.slow
def test_vit_b_16_itself() -> None:
    nodes = checked(graph_def(torchvision.models.vit_b_16(), torch.zeros(1, 3, 224, 224)))
    assert operators(nodes)["aten::native_layer_norm"] == 25
    assert shapes(nodes["output/output"]) == [(1, 1000)]


def test_control_flow_that_depends_on_the_data() -> None:
    model = Function(lambda self, x: x * self.weight if x.sum() > 0 else self.linear(x))
    assert operators(checked(graph_def(model, torch.ones(2, 3))))["aten::mul"] == 1
    assert operators(checked(graph_def(model, -torch.ones(2, 3))))["aten::addmm"] == 1


def test_a_write_into_a_view_reaches_those_who_read_the_whole() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        whole = torch.zeros(2, 3)
        whole[:, 0] = x
        return whole * self.weight

    nodes = checked(graph_def(Function(forward), torch.ones(2)))
    assert list(nodes["Function/mul"].input) == ["Function/copy_", "Function/weight"]
    assert "input/arguments/0" in ancestors(nodes, "output/output")


def test_the_outputs_of_an_operator_are_told_apart() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        left, right = torch.split(x * self.weight, 1)
        return right - left

    nodes = checked(graph_def(Function(forward), torch.ones(2, 3)))
    assert shapes(nodes["Function/split"]) == [(1, 3), (1, 3)]
    assert list(nodes["Function/sub"].input) == ["Function/split:1", "Function/split"]


def test_nested_inputs_and_outputs_keep_their_names() -> None:
    class Agent(nn.Module):
        def forward(self, observation: dict[str, Tensor], states: list[Tensor]) -> dict[str, Any]:
            return {"value/of:all": observation["left"] + states[1], "pair": (observation["right"], None)}

    observation = {"left": torch.zeros(1), "right": torch.zeros(2)}
    nodes = checked(graph_def(Agent(), (observation, [torch.zeros(1), torch.zeros(1)])))
    assert {name for name, node in nodes.items() if node.op == "IO Node"} == {
        "input/observation/left",
        "input/observation/right",
        "input/states/0",
        "input/states/1",
        "output/output/value_of_all",
        "output/output/pair/0",
    }
    assert list(nodes["Agent/add"].input) == ["input/observation/left", "input/states/1"]


def test_a_dictionary_is_one_argument() -> None:
    class Agent(nn.Module):
        def forward(self, observation: dict[str, Tensor]) -> Tensor:
            return observation["image"] + 1

    assert "input/observation/image" in checked(graph_def(Agent(), {"image": torch.zeros(1)}))


def test_a_module_called_again_gets_a_scope_for_each_call_and_one_set_of_parameters() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
            self.tied = nn.Linear(3, 3, bias=False)
            self.tied.weight = self.block.get_parameter("0.weight")

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.block(self.block(x)))  # type: ignore[no-any-return]

    nodes = checked(graph_def(Twice(), torch.zeros(1, 3)))
    assert list(nodes["Twice/Sequential[block]_1/Linear[0]/addmm"].input) == [
        "Twice/Sequential[block]/Linear[0]/bias",
        "Twice/Sequential[block]/Tanh[1]/tanh",
        "Twice/Sequential[block]_1/Linear[0]/t",
    ]
    assert operators(nodes)["Parameter"] == 2
    assert list(nodes["Twice/Linear[tied]/t"].input) == ["Twice/Sequential[block]/Linear[0]/weight"]


def test_tensors_from_elsewhere_are_constants() -> None:
    offset = torch.ones(3)
    nodes = checked(graph_def(Function(lambda _, x: x + offset), torch.zeros(3)))
    assert nodes["Function/constant"].op == "Const"
    assert list(nodes["Function/add"].input) == ["input/arguments/0", "Function/constant"]


def test_tensors_that_are_gone_are_not_taken_for_later_ones() -> None:
    def forward(_: Function, x: Tensor) -> Tensor:
        for step in range(20):
            x = x + torch.from_numpy(np.full(3, step, np.float32))
        return x

    assert operators(checked(graph_def(Function(forward), torch.zeros(3))))["Const"] == 20


def test_the_graph_is_the_same_every_time() -> None:
    make, inputs = MODELS["cnn"]
    first, second = (graph_def(make(), inputs).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


class Restless(nn.Module):
    """Changes, when it runs, whatever a forward pass can change."""

    count: Tensor
    history: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("history", torch.full((3,), torch.nan))
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.BatchNorm1d(3).eval()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.history = x.mean(0)
        x.add_(torch.randn_like(x))
        return self.dropout(self.norm(self.frozen(x)))  # type: ignore[no-any-return]


def test_recording_leaves_no_trace() -> None:
    model = Restless()
    x = torch.randn(4, 3)
    given = x.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()
    graph_def(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)
    assert [module.training for module in model.modules()] == modes
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_nothing_is_left(model)


def assert_nothing_is_left(model: nn.Module) -> None:
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert _get_current_dispatch_mode() is None
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def test_training_is_the_same_with_and_without_a_graph() -> None:
    def train(*, logged: bool) -> Tensor:
        torch.manual_seed(0)
        model = SimpleCNN()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            images = torch.randn(4, 3, 32, 32)
            if logged:
                graph_def(model, images)
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(train(logged=True), train(logged=False))


def test_a_model_that_fails_says_so_and_leaves_nothing_behind() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.linear(x.new_zeros(2, 7))  # type: ignore[no-any-return]

    model = nn.Sequential(Function(forward))
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        graph_def(model, torch.zeros(2, 3))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert_nothing_is_left(model)


def test_a_module_that_recovers_from_a_failure_keeps_the_scopes_right() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        with pytest.raises(RuntimeError):
            self.linear(x.new_zeros(2, 7))
        return x * self.weight

    assert "Function/mul" in checked(graph_def(Function(forward), torch.zeros(2, 3)))


def test_wrong_arguments_are_refused_before_the_model_runs() -> None:
    with pytest.raises(TypeError, match="too many positional arguments"):
        graph_def(SimpleCNN(), (torch.zeros(1, 3, 32, 32), torch.zeros(1)))


def test_lazy_modules_are_refused_for_they_would_be_initialized() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="lazy"):
        graph_def(model, torch.zeros(1, 2))
    assert "LazyLinear" in module_tree(model)


def test_the_same_model_may_run_in_another_thread_meanwhile() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        other = threading.Thread(target=self.linear, args=(x,))
        other.start()
        other.join()
        return x * self.weight

    assert list(checked(graph_def(Function(forward), torch.zeros(2, 3)))) == [
        "input/arguments/0",
        "Function/weight",
        "Function/mul",
        "output/output",
    ]


def test_the_compiler_of_torch_and_what_is_deprecated_are_not_imported() -> None:
    script = (
        "import sys, rlboard.writer, torch, rlboard.graph\n"
        "rlboard.graph.graph_def(torch.nn.Linear(2, 2), torch.zeros(1, 2))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_compiled_modules_are_shown_as_they_are_written() -> None:
    inner = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), backend="eager")
    inner(torch.zeros(1, 3))
    nodes = checked(graph_def(inner, torch.zeros(1, 3)))  # type: ignore[arg-type]
    assert "Sequential/Linear[0]/addmm" in nodes


def test_nothing_is_compiled_for_the_graph() -> None:
    model = nn.Sequential(nn.Tanh())
    model.compile(backend="eager")
    counters = pytest.importorskip("torch._dynamo.utils").counters
    counters.clear()
    assert "Sequential/Tanh[0]/tanh" in checked(graph_def(model, torch.zeros(1, 3)))
    assert not counters["frames"]
    model(torch.zeros(1, 3))
    assert counters["frames"], "afterwards it is compiled as before"


def test_a_model_without_data_can_be_drawn() -> None:
    model = nn.BatchNorm1d(3, device="meta")
    assert shapes(checked(graph_def(model, torch.zeros(2, 3, device="meta")))["output/output"]) == [(2, 3)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu() -> None:
    model = SimpleCNN().cuda()
    random = torch.cuda.get_rng_state()
    nodes = checked(graph_def(model, torch.zeros(2, 3, 32, 32, device="cuda")))
    assert operators(nodes)["aten::convolution"] == 2
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_the_module_tree_counts_parameters() -> None:
    assert module_tree(nn.Sequential(nn.Linear(4, 2), nn.Sequential(nn.ReLU()))).splitlines() == [
        "- **Sequential** `Sequential` 10 parameters",
        "    - **0** `Linear(in_features=4, out_features=2, bias=True)` 10 parameters",
        "    - **1** `Sequential` 0 parameters",
        "        - **0** `ReLU()` 0 parameters",
    ]


@pytest.mark.slow
@pytest.mark.browser
def test_the_graphs_tab_draws_every_model(tmp_path: Path) -> None:
    graphs = {run: graph_def(make(), inputs) for run, (make, inputs) in MODELS.items()}
    for run, graph in graphs.items():
        with EventFile(tmp_path / run) as events:
            events.event(Event(wall_time=1.0, graph_def=graph.SerializeToString()))
    with chromium() as page, tensorboard(tmp_path) as url:
        page.goto(f"{url}/#graphs")
        for run, graph in graphs.items():
            page.locator("tf-graph-controls paper-dropdown-menu").first.click()
            page.locator("paper-item", has_text=run).first.click()
            scopes = {tuple(node.name.split("/")[:2]) for node in graph.node}
            for root in ("input", "output", *(root for root, _ in scopes)):
                page.locator(f'g.node[data-name="{root}"]').wait_for(state="attached")
            (root,) = {root for root, _ in scopes} - {"input", "output"}
            page.locator(f'g.node[data-name="{root}"] > g.nodeshape').dispatch_event("dblclick")
            for scope in (f"{root}/{child}" for parent, child in scopes if parent == root):
                page.locator(f'g.node[data-name="{scope}"]').wait_for(state="attached")
