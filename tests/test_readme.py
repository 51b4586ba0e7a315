"""The Python of the README and of docs/ runs as it stands."""

import subprocess
import sys

import pytest
import snippets

PAGES = sorted((snippets.ROOT / "docs").glob("*.md"))
PROCESSES = "ddp.md"  # a script for torchrun


def test_the_python_of_the_readme_runs():
    page = snippets.ROOT / "README.md"
    assert len(snippets.python_of(page)) >= 3
    names = snippets.run(page)
    assert names["rows"].shape[1] == 64
    assert names["out"].loss.isfinite()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in (PROCESSES, "README.md")], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the files it writes
    assert snippets.python_of(page)
    snippets.run(page)


def test_the_script_for_several_processes_runs(tmp_path):
    (script,) = snippets.python_of(snippets.ROOT / "docs" / PROCESSES)
    (tmp_path / "train.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 processes, loss " in done.stdout
    assert (tmp_path / "widenet.pt").exists()


@pytest.mark.parametrize("page", [snippets.ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in snippets.links(page):
        assert (page.parent / link).exists(), link


def test_the_index_names_every_page():
    index = snippets.ROOT / "docs" / "README.md"
    assert {page.name for page in PAGES} - {"README.md"} == set(snippets.links(index))
