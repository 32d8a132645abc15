"""Every Python example in the docs runs, every page it links to exists, and the catalogue is what the cards say."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from manyheads.catalogue.page import catalogue_page
from manyheads.cli import app
from manyheads.compare.experiment import create_experiment

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


def blocks(page: Path, *languages: str) -> list[str]:
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```"
    return re.findall(pattern, page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_experiments_in_the_docs_are_valid() -> None:
    found = [(page.name, yaml.safe_load(text)) for page in PAGES for text in blocks(page, "yaml")]
    assert len(found) >= 2
    for name, changes in found:
        assert create_experiment(changes, where=name).mechanisms


def test_commands_in_the_docs_are_commands() -> None:
    root = typer.main.get_command(app)
    lines = [line for page in PAGES for text in blocks(page, "") for line in text.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("manyheads ")]
    assert len(commands) >= 4
    for name, *arguments in commands:
        root.resolve_command(typer.Context(root), [name])[1].make_context(name, arguments)  # type: ignore[attr-defined]
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert set(targets) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_catalogue_is_generated_from_the_cards() -> None:
    written = (ROOT / "docs" / "catalogue.md").read_text()
    assert written == catalogue_page(), "run `python -m manyheads.catalogue > docs/catalogue.md`"
