"""Who may import whom: the package's imports, read from its syntax trees, against the table of the design."""

import ast
import pathlib
import sys

import pytest

import widenet_kernels

PACKAGE = pathlib.Path(widenet_kernels.__file__).parent
ALLOWED = {
    "routing": set(),
    "reference": {"routing"},
    "triton": {"routing"},
    "ops": {"routing", "reference", "triton"},
    "nn": {"ops", "routing"},
    "models": {"nn"},
    "training": set(),
    "integrations": {"models", "nn", "ops"},
    "testing": {"routing", "reference", "ops"},
}
OPTIONAL = {"safetensors": {"models"}, "transformers": {"integrations"}}  # not installed with us: who may import them
FREE = {"__init__", "__main__"}  # the exports and the command line see everything


def imports(tree):
    """The modules that a file imports, each with the line and whether it is at the top level."""
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module == "widenet_kernels":
                for alias in node.names:
                    yield f"widenet_kernels.{alias.name}", node.lineno, node in top
            else:
                yield node.module, node.lineno, node in top


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_is_in_the_table():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert parts - FREE <= set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in FREE:
        return
    for module, line, at_top in imports(ast.parse(path.read_text())):
        where = f"{path.name}:{line} imports {module}"
        root, _, inner = module.partition(".")
        if root == "triton":
            assert part == "triton", where
        if root in OPTIONAL:
            assert part in OPTIONAL[root], where
            # a folder of that name is for its users alone
            assert root in path.parts or not at_top, f"{where} at its top: optional packages are imported when used"
        if root == "torch" or root != "widenet_kernels":
            continue
        other = inner.partition(".")[0]
        if other == "__version__":
            continue
        assert other == part or other in ALLOWED[part], where
        assert other != "triton" or part == "triton" or not at_top, f"{where} at its top: Triton is imported when used"


@pytest.mark.parametrize("part", ["routing", "training"])
def test_imports_torch_alone(part):
    """Beside the standard library; of the package nothing but itself, by the table."""
    paths = [path for path in FILES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == part]
    modules = {module.partition(".")[0] for path in paths for module, _, _ in imports(ast.parse(path.read_text()))}
    assert modules - sys.stdlib_module_names <= {"torch", "widenet_kernels"}
    assert "torch" in modules
