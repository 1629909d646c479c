"""What pyproject.toml asks for is what the code imports, and the README gives a reason for each."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
OPTIONAL = ("fallback", "plot", "otel")  # extras of pyproject.toml whose packages the code imports
DISTRIBUTIONS = {  # where named otherwise
    "opentelemetry": "opentelemetry-sdk",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
BY_NAME = {"uvloop"}  # uvicorn imports it: serve/server.py tells it to
WITH_TORCH = {"triton"}  # comes with torch where torch runs on CUDA or ROCm; the code goes on without it


def declared(field: str = "dependencies") -> set[str]:
    (block,) = re.findall(rf"^{field} = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    return {Requirement(text).name for text in re.findall(r'"(.+?)"', block)}


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def imported(*, at_import: bool = False) -> set[str]:
    """The third-party packages that src imports, anywhere in a file, or outside of functions only."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "src").rglob("*.py")]
    names = set().union(*(imports(tree.body if at_import else ast.walk(tree)) for tree in trees))
    return {DISTRIBUTIONS.get(name, name) for name in names - set(sys.stdlib_module_names) - {"paceline"}}


def optional() -> set[str]:
    return WITH_TORCH.union(*(declared(extra) for extra in OPTIONAL))


def test_every_import_is_declared_and_every_dependency_imported():
    assert (imported() - optional()) | BY_NAME == declared()
    told = (ROOT / "src" / "paceline" / "serve" / "server.py").read_text()
    assert all(f'"{name}"' in told for name in BY_NAME)


def test_an_optional_dependency_is_imported_only_where_it_is_used():
    assert not imported(at_import=True) & (optional() - WITH_TORCH)


def test_modules_that_import_triton_are_imported_only_where_a_kernel_is_launched():
    paths = {path: ast.parse(path.read_text()) for path in (ROOT / "src").rglob("*.py")}
    needy = {path.stem for path, tree in paths.items() if "triton" in imports(tree.body)}
    assert needy
    for path, tree in paths.items():
        if path.stem not in needy:
            at_import = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
            assert not needy & {module.split(".")[-1] for module in at_import}, path


def test_the_readme_gives_a_reason_for_each():
    section = (ROOT / "README.md").read_text().split("## Dependencies")[1].split("\n## ")[0]
    reasons = dict(re.findall(r"^\| ([\w-]+) \| (.+?) \|$", section, re.MULTILINE))
    reasons.pop("package")
    assert set(reasons) == declared()


@pytest.mark.parametrize("name", sorted(declared()))
def test_the_constraints_hold_it_to_one_version(name):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    assert name.replace("_", "-") in pinned
