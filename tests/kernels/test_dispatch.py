"""Which implementation runs: on a toy op whose implementations say their name, and on every op of the registry."""

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo import kernels
from zoo.attention import create_attention
from zoo.catalogue import count_macs
from zoo.kernels import dispatch
from zoo.kernels.dispatch import Op

ROOT = str(Path(__file__).resolve().parents[2])

# Tensors for every op of the registry, and what follows them; a new op without an entry fails here.
SAMPLES = {
    "context_broadcast": lambda: (torch.randn(2, 5, 3), torch.randn(3)),
    "depthwise_conv2d": lambda: (torch.randn(2, 5, 6, 7), torch.randn(5, 1, 3, 3), torch.randn(5)),
    "focused_linear_attention": lambda: (
        *torch.randn(3, 2, 5, 6),
        torch.randn(1, 5, 6),
        torch.rand(6) + 0.5,
    ),
    "halo_attention": lambda: (*torch.randn(3, 2, 5, 6, 2, 4), *torch.randn(2, 15, 4)),
    "lambda_attention": lambda: (torch.randn(2, 12, 9, 2, 4), torch.randn(2, 12, 9, 1, 3), torch.randn(3, 3, 4, 1)),
}
FIXED: dict[str, tuple] = {
    "depthwise_conv2d": (1, 1),
    "focused_linear_attention": (2, 3),
    "halo_attention": (4, 2, 0.5),
}

MAPS = ("halo_attention", "lambda_attention")

scripting_is_old = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning"
)


def toy(unsupported=None, **options):
    return Op("toy", lambda x: "reference", lambda x: "triton", lambda x: unsupported, **options)


@pytest.fixture
def cuda_tensor():
    """A tensor that says it is on a GPU, without one."""
    with FakeTensorMode():
        return torch.empty(2, 3, device="cuda")


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "DEFAULT", "auto")


def test_the_kernel_runs_on_cuda_and_the_reference_on_the_cpu(cuda_tensor):
    assert dispatch.dispatch(toy(), "auto", cuda_tensor) == "triton"
    assert dispatch.dispatch(toy(), "triton", cuda_tensor) == "triton"
    assert dispatch.dispatch(toy(), "reference", cuda_tensor) == "reference"
    assert dispatch.dispatch(toy(), "auto", torch.empty(2)) == "reference"


def test_auto_falls_back_and_an_explicit_choice_says_why_not(cuda_tensor, monkeypatch):
    rules_out = toy("x is torch.float64")
    assert dispatch.dispatch(rules_out, "auto", cuda_tensor) == "reference"
    with pytest.raises(RuntimeError, match=r"impl='triton' was asked for, but in toy x is torch.float64"):
        dispatch.dispatch(rules_out, "triton", cuda_tensor)
    with pytest.raises(RuntimeError, match="tensor is on cpu"):
        dispatch.dispatch(rules_out, "triton", torch.empty(2))
    with pytest.raises(ValueError, match=r"impl='fast'; valid: auto, reference, triton"):
        dispatch.dispatch(toy(), "fast", torch.empty(2))
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.dispatch(toy(), "auto", cuda_tensor) == "reference"
    with pytest.raises(RuntimeError, match="triton is not installed"):
        dispatch.dispatch(toy(), "triton", torch.empty(2))


def test_a_context_sets_what_auto_stands_for(cuda_tensor):
    with dispatch.standing_for("reference"):
        assert dispatch.dispatch(toy(), "auto", cuda_tensor) == "reference"
    with pytest.raises(RuntimeError, match="too wide"), dispatch.standing_for("triton"):
        dispatch.dispatch(toy("too wide"), "auto", cuda_tensor)
    assert dispatch.dispatch(toy(), "auto", cuda_tensor) == "triton"
    with pytest.raises(ValueError, match="'fast'"), dispatch.standing_for("fast"):
        pass


@pytest.mark.parametrize("name", ["focused_linear", "halo", "lambda"])
def test_multiply_adds_on_a_gpu_are_those_on_the_cpu(name):
    """torch's counter knows nothing of kernels."""

    def counted():
        attention = create_attention(name, 32, layout="map", grid_size=(16, 16)).eval()
        return count_macs(attention, (32, 16, 16))

    want = counted()
    with FakeTensorMode(), torch.device("cuda"):
        assert counted() == want


def test_explain_says_what_auto_takes_and_why(cuda_tensor, monkeypatch):
    monkeypatch.setitem(dispatch.OPS, "toy", toy())
    assert dispatch.explain("toy", cuda_tensor) == "triton"
    assert dispatch.explain("toy", torch.empty(2)).startswith("reference: the tensor is on cpu")
    monkeypatch.setitem(dispatch.OPS, "toy", toy(unsupported="so odd", slower=lambda x: "so few"))
    assert dispatch.explain("toy", cuda_tensor) == "reference: so odd"
    monkeypatch.setattr(dispatch, "DEFAULT", "triton")
    assert dispatch.explain("toy", torch.empty(2)).startswith("reference: the tensor is on cpu")
    assert dispatch.explain("toy", cuda_tensor).startswith("an error: ZOO_KERNELS=triton was asked for, but in toy ")
    monkeypatch.setattr(dispatch, "_insist", lambda *_: True)
    assert dispatch.explain("toy", cuda_tensor) == "triton: ZOO_KERNELS=triton"
    with pytest.raises(ValueError, match="no kernel op 'flash'; valid: context_broadcast"):
        dispatch.explain("flash", cuda_tensor)


def test_auto_leaves_what_is_slower_and_an_explicit_choice_takes_it(cuda_tensor, monkeypatch):
    waits = toy(slower=lambda x: "so few channels")
    assert dispatch.dispatch(waits, "auto", cuda_tensor) == "reference"
    assert dispatch.dispatch(waits, "triton", cuda_tensor) == "triton"
    monkeypatch.setattr(dispatch, "DEFAULT", "triton")
    assert dispatch.dispatch(waits, "auto", cuda_tensor) == "triton"


def test_inside_compile_the_op_decides(cuda_tensor, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.dispatch(toy(), "auto", cuda_tensor) == "reference"
    assert dispatch.dispatch(toy(auto_in_compile=True), "auto", cuda_tensor) == "triton"
    assert dispatch.dispatch(toy(), "triton", cuda_tensor) == "triton"


@pytest.mark.parametrize("by", ["torch.compiler._is_exporting_flag", "torch.jit.is_tracing"])
def test_an_exported_graph_holds_no_kernel(by, cuda_tensor, monkeypatch):
    monkeypatch.setattr(by, (lambda: True) if by == "torch.jit.is_tracing" else True)
    for default in ("auto", "triton"):
        monkeypatch.setattr(dispatch, "DEFAULT", default)
        assert dispatch.dispatch(toy(auto_in_compile=True), "auto", cuda_tensor) == "reference"
    with pytest.raises(RuntimeError, match="being exported"):
        dispatch.dispatch(toy(), "triton", cuda_tensor)


def test_derivatives_that_kernels_do_not_answer_take_the_reference(cuda_tensor):
    """A registered op drops the tangent of forward mode, and torch.func cannot look into its backward."""
    asked = []

    def inside(x):
        asked.append(dispatch.dispatch(toy(), "auto", cuda_tensor))
        with pytest.raises(RuntimeError, match=r"impl='triton' was asked for, but in toy (forward-mode|torch\.func)"):
            dispatch.dispatch(toy(), "triton", cuda_tensor)
        return x.sum()

    torch.func.grad(inside)(torch.ones(2))
    torch.func.vmap(inside)(torch.ones(2, 2))
    torch.func.jvp(inside, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        inside(torch.ones(2))
    assert asked == ["reference"] * 4
    assert dispatch.dispatch(toy(), "auto", cuda_tensor) == "triton"


def test_the_environment_stands_in_for_auto(cuda_tensor, monkeypatch):
    monkeypatch.setattr(dispatch, "DEFAULT", "reference")
    assert dispatch.dispatch(toy(), "auto", cuda_tensor) == "reference"
    assert dispatch.dispatch(toy(), "triton", cuda_tensor) == "triton"
    monkeypatch.setattr(dispatch, "DEFAULT", "triton")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.dispatch(toy(), "auto", cuda_tensor) == "triton"
    assert dispatch.dispatch(toy(), "auto", torch.empty(2)) == "reference"
    with pytest.raises(RuntimeError, match="ZOO_KERNELS=triton was asked for, but in toy too wide"):
        dispatch.dispatch(toy("too wide"), "auto", cuda_tensor)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'context_broadcast' is registered already"):
        dispatch.register(Op("context_broadcast", *[lambda x: x] * 3))


def test_every_op_has_samples():
    assert set(SAMPLES) == set(dispatch.OPS)


@pytest.mark.parametrize("name", dispatch.OPS)
def test_every_op_obeys_the_contract_on_the_cpu(name):
    assert name in kernels.__all__
    function, tensors = getattr(kernels, name), SAMPLES[name]()
    assert inspect.signature(function).parameters["impl"].default == "auto"
    want = dispatch.OPS[name].reference(*tensors, *FIXED.get(name, ()))
    assert torch.equal(function(*tensors, *FIXED.get(name, ())), want)
    assert torch.equal(function(*tensors, *FIXED.get(name, ()), impl="reference"), want)
    with pytest.raises(RuntimeError, match=f"in {name} the tensor is on cpu"):
        function(*tensors, *FIXED.get(name, ()), impl="triton")
    with pytest.raises(ValueError, match="impl='fast'"):
        function(*tensors, *FIXED.get(name, ()), impl="fast")


@pytest.mark.parametrize("name", dispatch.OPS)
def test_autocast_does_not_round_inside_the_reference(name):
    function, tensors = getattr(kernels, name), SAMPLES[name]()
    want = function(*tensors, *FIXED.get(name, ()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(*tensors, *FIXED.get(name, ())), want)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*tensors, *FIXED.get(name, ())), want)


# Sizes of a map as symbols take torch a quarter of a minute where blocks are cut from them.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MAPS else []) for name in dispatch.OPS]
)
def test_one_graph_for_changing_sizes(name):
    tensors, fixed = SAMPLES[name](), FIXED.get(name, ())
    compiled = torch.compile(getattr(kernels, name), fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*tensors, *fixed), dispatch.OPS[name].reference(*tensors, *fixed))


@pytest.mark.parametrize("name", MAPS)
def test_one_graph_for_changing_batches(name):
    tensors, fixed, counter = SAMPLES[name](), FIXED.get(name, ()), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels, name), fullgraph=True, backend=counter)
    for count in (1, 2, 3):
        # The first axis of maps is their images; tables have none.
        given = [torch.cat([t] * count) if t.ndim == 5 else t for t in tensors]
        for t in given:
            if t.ndim == 5:
                torch._dynamo.mark_dynamic(t, 0)
        assert torch.equal(compiled(*given, *fixed), dispatch.OPS[name].reference(*given, *fixed))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", dispatch.OPS)
@scripting_is_old
def test_every_graph_takes_the_reference(name):
    tensors = SAMPLES[name]()

    class Net(torch.nn.Module):
        def forward(self, *given):
            return getattr(kernels, name)(*given, *FIXED.get(name, ()))

    graphs = {
        "compile": torch.compile(Net(), fullgraph=True, backend="aot_eager"),
        "trace": torch.jit.trace(Net(), tensors),
        "script": torch.jit.script(getattr(kernels, name)),
    }
    for strict in (False, True):
        exported = torch.export.export(Net(), tensors, strict=strict)
        assert not [node for node in exported.graph.nodes if "zoo" in str(node.target)]
        graphs[f"export, strict={strict}"] = exported.module()

    class Fixed(torch.nn.Module):  # a traced forward has a fixed number of arguments
        def forward(self, x):
            return getattr(kernels, name)(x, *tensors[1:], *FIXED.get(name, ()))

    traced = torch.fx.symbolic_trace(Fixed())
    assert not [node for node in traced.graph.nodes if "zoo" in str(node.target)]
    want = dispatch.OPS[name].reference(*tensors, *FIXED.get(name, ()))
    assert torch.equal(traced(tensors[0]), want)
    for kind, graph in graphs.items():
        given = tensors + FIXED.get(name, ()) if kind == "script" else tensors
        assert torch.equal(graph(*given), want), kind


@scripting_is_old
@pytest.mark.parametrize("name", dispatch.OPS)
def test_torchscript_refuses_an_explicit_kernel(name):
    scripted = torch.jit.script(getattr(kernels, name))
    with pytest.raises(Exception, match="TorchScript takes the reference"):
        scripted(*SAMPLES[name](), *FIXED.get(name, ()), impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", dispatch.OPS)
@pytest.mark.parametrize("strict", [False, True])
def test_export_on_the_gpu_takes_the_reference(name, strict):
    class Net(torch.nn.Module):
        def forward(self, *given):
            return getattr(kernels, name)(*given, *FIXED.get(name, ()))

    tensors = tuple(tensor.cuda() for tensor in SAMPLES[name]())
    exported = torch.export.export(Net(), tensors, strict=strict)
    assert not [node for node in exported.graph.nodes if "zoo" in str(node.target)]


def test_environment_sets_the_default_at_import(monkeypatch):
    def imported():
        return runpy.run_path(dispatch.__file__, run_name="dispatch_again")["DEFAULT"]

    monkeypatch.setenv("ZOO_KERNELS", "reference")
    assert imported() == "reference"
    monkeypatch.delenv("ZOO_KERNELS")
    assert imported() == "auto"
    monkeypatch.setenv("ZOO_KERNELS", "fastest")
    with pytest.raises(ValueError, match="ZOO_KERNELS='fastest'; valid: auto, reference, triton"):
        imported()


def test_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch; from zoo import kernels; x = torch.ones(1, 2, 3)\n"
        "print(kernels.context_broadcast(x).sum().item())\n"
        "try: kernels.context_broadcast(x, impl='triton')\nexcept RuntimeError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ZOO_KERNELS"}
    environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), ROOT])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6.0\n")
    assert "triton is not installed" in done.stdout


def test_explain_takes_what_the_ops_take():
    """Their defaults too, on a GPU; halos wider than blocks, whose kernel compiles for minutes, are not its own."""
    with FakeTensorMode(), torch.device("cuda"):
        q, table = torch.empty(2, 8, 8, 2, 16, dtype=torch.bfloat16), torch.empty(15, 16)
        assert dispatch.explain("halo_attention", q, q, q, table, table, 4, 2, 0.5) == "triton"
        wide = dispatch.explain("halo_attention", q, q, q, table, table, 1, 4, 0.5)
        assert wide.startswith("reference: halo=4 is wider than block=1")
        assert dispatch.explain("context_broadcast", torch.empty(2, 5, 16)) == "triton"
