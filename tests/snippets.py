"""The Python in a Markdown page."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = {
    "matplotlib": None,
    "transformers": "5.0",
}  # packages that are not installed with us, and from which version


def python_of(page: Path) -> list[str]:
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for package, version in OPTIONAL.items():
        if any(re.search(rf"^(import|from) {package}\b", snippet, re.MULTILINE) for snippet in snippets):
            pytest.importorskip(package, minversion=version)
    return snippets


def run(page: Path) -> dict[str, Any]:
    """Every snippet goes on where the one before it stopped; the names that they leave."""
    names: dict[str, Any] = {}
    for snippet in python_of(page):
        exec(compile(snippet, page.name, "exec"), names)
    return names


def links(page: Path) -> list[str]:
    """To files beside it or below, pictures too."""
    targets = re.findall(r"\]\((.*?)\)", page.read_text())
    return [target for target in targets if not target.startswith(("http", "#"))]
