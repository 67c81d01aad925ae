"""The choice of a backend, and what importing the package must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lean_kernels
from lean_kernels import _rt

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import lean_kernels, torch
h, head, target = torch.randn(3, 16), torch.randn(20, 16), torch.tensor([1, 2, 3])
assert lean_kernels.linear_ce(h, head, target).loss.isfinite().all()
assert not torch.cuda.is_initialized()
import importlib.util
importlib.util.find_spec = lambda name, *rest: None
try:
    lean_kernels.linear_ce(h, head, target, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_without_triton_the_torch_path_works_and_triton_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs the package triton" in done.stdout


def test_an_unknown_backend_and_float64_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="auto, torch, triton"):
        lean_kernels.choose_backend("cuda", x)
    with pytest.raises(TypeError, match="float64"):
        lean_kernels.choose_backend("triton", x.double())
    monkeypatch.setattr(_rt, "INTERPRET", False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            lean_kernels.choose_backend("triton", x)
    monkeypatch.setenv("LEAN_KERNELS_BACKEND", "torch")
    assert lean_kernels.choose_backend("auto", x) == "torch"


@pytest.mark.parametrize(("n", "expected"), [(0, 16), (1, 16), (17, 32), (1024, 1024), (1025, 2048)])
def test_buckets_are_powers_of_two(n: int, expected: int) -> None:
    assert _rt.bucket(n) == expected


def unconverted_operands(source: str) -> list[str]:
    """Operands of `tl.dot` that come straight from `tl.load` and stay as they are, as "function:name".

    The interpreter takes bfloat16 for whole numbers, so the product of such operands is wrong without an error. What
    `if UPCAST: ... else: ...` does in its second branch is for the compiler alone.
    """
    found = []
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        loaded, converted = set(), set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                tuples = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                for name, made in zip(target.elts, value.elts) if tuples else [(target, value)]:
                    text = ast.unparse(made)
                    kind = converted if text.endswith(".to(tl.float32)") else loaded
                    if kind is converted or text.startswith("tl.load("):
                        kind.add(ast.unparse(name))
        choices = [
            node for node in ast.walk(function) if isinstance(node, ast.If) and ast.unparse(node.test) == "UPCAST"
        ]
        compiled = {id(node) for choice in choices for branch in choice.orelse for node in ast.walk(branch)}
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot" and id(node) not in compiled:
                operands = [operand for operand in node.args[:2] if ".to(tl.float32)" not in ast.unparse(operand)]
                names = {part.id for operand in operands for part in ast.walk(operand) if isinstance(part, ast.Name)}
                found += [f"{function.name}:{name}" for name in sorted((names & loaded) - converted)]
    return found


SOURCES = sorted((Path(lean_kernels.__file__).parent / "triton").glob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_operands_are_converted_before_a_product(file: Path) -> None:
    assert unconverted_operands(file.read_text()) == []


def test_the_check_finds_an_operand_that_is_not_converted() -> None:
    wrong = """
def _kernel(x, y, UPCAST):
    a = tl.load(x)
    b = tl.load(y, mask=m, other=0.0)
    if UPCAST:
        a = a.to(tl.float32)
    return tl.dot(a, tl.trans(b))
"""
    assert unconverted_operands(wrong) == ["_kernel:b"]
    assert unconverted_operands(wrong.replace("a = a.to(", "a, b = b.to(tl.float32), a.to(")) == []


def test_importing_the_package_imports_neither_torch_nor_triton() -> None:
    script = "import sys, lean_kernels; print([name for name in ('torch', 'triton', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_the_modules_of_ops_offer_is_offered_by_the_package() -> None:
    offered = {}
    for file in (Path(lean_kernels.__file__).parent / "ops").glob("[!_]*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                offered[node.name] = file.stem
    # these two are plain torch and live in `ref`
    assert offered | {"pack_mask": "sparse_lora", "unpack_mask": "sparse_lora"} == lean_kernels.OPERATIONS


def test_a_launch_is_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = ["cuda:0"]

    class Device:
        def __init__(self, device: str) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *error: object) -> None:
            current.pop()

    class OnGpu(torch.Tensor):
        is_cuda = True
        device = "cuda:1"

    monkeypatch.setattr(torch.cuda, "device", Device)
    launch = _rt.launcher(lambda scale, *tensors, **more: current[-1])
    assert launch(1.0, torch.zeros(1).as_subclass(OnGpu)) == "cuda:1"
    assert launch(1.0, x=torch.zeros(1).as_subclass(OnGpu)) == "cuda:1"
    assert launch(1.0, torch.zeros(1)) == "cuda:0"
    assert current == ["cuda:0"]


def test_every_launcher_changes_to_the_gpu() -> None:
    for file in SOURCES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and "Tensor" in ast.unparse(node):
                called_by_launchers = node.name == "choose"
                assert called_by_launchers or "_rt.launcher" in ast.unparse(node.decorator_list[0]), node.name


def test_a_configuration_that_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(_rt, "INTERPRET", False)
    monkeypatch.delenv("LEAN_KERNELS_AUTOTUNE", raising=False)
    kept: list[object] = []
    monkeypatch.setattr(triton, "autotune", lambda **given: given)
    configs = [triton.Config({"BN": n}, num_warps=w) for n, w in ((64, 4), (128, 4), (128, 8))]
    fallback = triton.Config({"BN": 32})

    def fits(values, warps, stages):
        kept.append((values["x"], values["N"], stages))
        return values["BN"] * values["N"] <= 32 * warps

    given = _rt.tune(configs, key=["N"], fallback=fallback, fits=fits)
    prune = given["prune_configs_by"]["early_config_prune"]
    assert prune(configs, {"x": "tensor", "N": 2}, OTHER=1) == [configs[0], configs[2]]
    assert prune(configs, {"x": "tensor", "N": 9}) == [fallback]
    assert ("tensor", 9, 3) in kept


def test_names_of_the_package_are_there_and_others_are_not() -> None:
    for name in lean_kernels.__all__:
        assert callable(getattr(lean_kernels, name))
        assert name in dir(lean_kernels)
    with pytest.raises(AttributeError, match="no attribute 'attention'"):
        lean_kernels.attention  # noqa: B018


def test_tensors_on_two_devices_are_named() -> None:
    with pytest.raises(RuntimeError, match="k is on meta, but q is on cpu"):
        _rt.same_device(q=torch.zeros(1), mask=None, k=torch.zeros(1, device="meta"))
