"""The README's Python runs as it stands."""

import re
from pathlib import Path


def test_the_python_of_the_readme_runs():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(snippets) >= 3
    names: dict = {}
    for snippet in snippets:  # each goes on where the one before it stopped
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["rows"].shape[1] == 64
    assert names["out"].loss.isfinite()
