"""What an import costs and touches, and who may import whom."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_efx
from hf_efx.registry import METHODS

PACKAGE = Path(hf_efx.__file__).parent
METHOD_FOLDERS = sorted(name for name in METHODS if (PACKAGE / name).is_dir())

# A method that builds on another's score, one way each; see CONTRIBUTING.md.
ALLOWED = {("goldiprox", "rho_loss"), ("bdl_benchmark", "mc_dropout")}


def imported(file: Path) -> set[str]:
    """Every module of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "hf_efx"}


def methods_in(modules: set[str]) -> set[str]:
    parts = {name.split(".")[1] for name in modules if "." in name}
    return parts & METHODS.keys()


def test_core_imports_no_method() -> None:
    files = sorted((PACKAGE / "core").rglob("*.py"))
    assert len(files) > 10
    assert {file.name: methods_in(imported(file)) for file in files} == {file.name: set() for file in files}


@pytest.mark.parametrize("method", METHOD_FOLDERS)
def test_methods_do_not_import_each_other(method: str) -> None:
    files = sorted((PACKAGE / method).rglob("*.py"))
    assert files
    for file in files:
        others = methods_in(imported(file)) - {method}
        assert {(method, other) for other in others} <= ALLOWED, file


def test_low_rank_is_among_the_methods_checked() -> None:
    assert "low_rank" in METHOD_FOLDERS


def test_what_loading_imports_keeps_peft_out() -> None:
    # transformers imports loading.py while it is itself being imported, and peft imports transformers.
    for name in ("loading", "efx_config"):
        tree = ast.parse((PACKAGE / "core" / f"{name}.py").read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
        assert not any(str(name).startswith(("peft", "hf_efx.core.adapter")) for name in names)


@pytest.fixture(scope="module")
def import_costs(run_python: Callable[..., str]) -> list[tuple[float, set[str]]]:
    """Seconds and new modules of `import hf_efx`, in three processes."""
    program = """
        import sys, time
        before, start = set(sys.modules), time.perf_counter()
        import hf_efx
        print(time.perf_counter() - start, *sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """
    lines = [run_python(program).split() for _ in range(3)]
    return [(float(seconds), set(names)) for seconds, *names in lines]


def test_import_is_fast(import_costs: list[tuple[float, set[str]]]) -> None:
    assert min(seconds for seconds, _ in import_costs) < 0.5


def test_import_loads_neither_torch_nor_peft_nor_transformers(import_costs: list[tuple[float, set[str]]]) -> None:
    for _, names in import_costs:
        assert "hf_efx" in names
        assert not names & {"torch", "peft", "transformers", "accelerate", "datasets", "numpy", "huggingface_hub"}


ORDER_PROGRAM = """
    import sys
    {imports}
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    print(AUTO_QUANTIZER_MAPPING["hf_efx"].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING["hf_efx"].__name__)
    print("peft" in sys.modules, "hf_efx.core.adapter" in sys.modules)
"""


@pytest.mark.parametrize(
    "imports",
    ["import hf_efx, transformers", "import transformers, hf_efx", "import transformers.quantizers.auto, hf_efx"],
    ids=["hf_efx first", "transformers first", "its registry first"],
)
def test_either_order_registers_the_loading(imports: str, run_python: Callable[..., str]) -> None:
    lines = run_python(ORDER_PROGRAM.format(imports=imports)).splitlines()
    assert lines == ["EfxQuantizer EfxConfig", "False False"]


@pytest.mark.parametrize("name", sorted(set(hf_efx.__all__) - {"__version__"}))
def test_public_name_is_there_and_described(name: str) -> None:
    value = getattr(hf_efx, name)
    assert value.__name__ == name and value.__module__.startswith("hf_efx.")
    assert value.__doc__ and inspect.getdoc(value) == inspect.cleandoc(value.__doc__)
    if inspect.isclass(value):
        assert "__doc__" in vars(value)  # its own, not a base class' or a dataclass' signature
        assert not value.__doc__.startswith(f"{name}(")
        for attribute, member in vars(value).items():
            if inspect.isfunction(member) and not attribute.startswith("_"):
                assert member.__doc__, f"{name}.{attribute}"


def test_names_agree_with_the_type_checker_s() -> None:
    tree = ast.parse(Path(hf_efx.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    checked = {alias.asname or alias.name for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert checked == set(hf_efx.__all__) - {"__version__"}
    assert set(hf_efx.__all__) <= set(dir(hf_efx))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hf_efx' has no attribute 'LowRnkConfig'"):
        hf_efx.LowRnkConfig  # noqa: B018  # pyright: ignore


def test_registry_s_classes_are_there() -> None:
    for method in METHODS.values():
        if method.config:
            module, _, name = method.config.rpartition(".")
            config = getattr(importlib.import_module(module), name)
            assert config.method == method.name
    assert sys.modules["hf_efx.low_rank"]


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
