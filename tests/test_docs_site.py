"""The site builds without a warning, shows every public name, and asks no other host for anything."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import equipoise as eq
from browser import Tab, browser, chromium
from equipoise.cli.common import app

pytest.importorskip("mkdocs", reason="the site needs the extra [docs]")
pytest.importorskip("material", reason="the site needs the extra [docs]")
pytest.importorskip("mkdocstrings", reason="the site needs the extra [docs]")

ROOT = Path(__file__).resolve().parents[1]
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\bsrc=\"(?:https?:)?//[^\"]*"
    r"|<link\b(?![^>]*\brel=\"(?:canonical|next|prev)\")[^>]*\bhref=\"(?:https?:)?//[^\"]*"
    r"|@import\s*[\"']?(?:https?:)?//[^\"')]*|url\([\"']?(?:https?:)?//[^\"')]*"
)
"""What a browser would load from elsewhere; a link that a reader may follow is not among it."""
HOSTS = re.compile(
    r"[\w.-]*(?:unpkg|jsdelivr|cdnjs|cloudflare|googleapis|gstatic|jquery|bootstrapcdn|pypi|pythonhosted|npmjs|esm\.sh)"
    r"[\w-]*\.(?:com|net|org|io|sh)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning fails it."""
    out = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def page(site: Path, name: str) -> str:
    return (site / name).read_text(encoding="utf-8")


def test_every_page_and_tutorial_is_in_the_site(site: Path) -> None:
    for source in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/tutorials/*.py")):
        built = site / source.relative_to(ROOT / "docs").with_suffix(".html")
        assert built.is_file(), source
        # in the navigation, too, which stands on every page
        assert built.relative_to(site).as_posix() in page(site, "index.html") or source.stem == "index", source


def test_every_public_name_is_in_the_reference_with_words(site: Path) -> None:
    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    headings = set(re.findall(r"<h2 id=\"[\w.]+\" class=\"doc doc-heading\">\s*(equipoise\.\w+)", reference))
    assert headings >= {f"equipoise.{name}" for name in eq.__all__}
    assert [name for name in eq.__all__ if not (getattr(eq, name).__doc__ or "").strip()] == []


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    built = page(site, "commands.html")
    program: Any = typer.main.get_command(app)
    for name, command in program.commands.items():
        section = built[built.index(f'id="equipoise-{name}"') :].split("<h2", 1)[0]
        shown = set(re.findall(r"<code>(--?[\w-]+)", section))
        assert shown == {option for each in command.params for option in each.opts if option.startswith("-")} | {
            option for each in command.params for option in each.secondary_opts
        }


def test_theorems_lead_to_their_functions_and_sections(site: Path) -> None:
    theorems = page(site, "theorems.html")
    names = re.findall(r"`(equipoise(?:\.\w+)+)`", (ROOT / "docs" / "theorems.md").read_text(encoding="utf-8"))
    links = re.findall(r"href=\"(api/\w+\.html)#([\w.]+)\"", theorems)
    assert len(links) >= len(names)
    for target, anchor in links:
        assert f'id="{anchor}"' in page(site, target)
    assert 'href="theory.html#section-5"' in theorems


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for path in site.rglob("*"):
        if path.suffix in (".html", ".js", ".css", ".json", ".xml"):
            text = path.read_text(encoding="utf-8")
            assert FETCHED.search(text) is None, path
            assert HOSTS.search(text) is None, path


@pytest.mark.parametrize(
    "text",
    [
        '<script async src="https://cdn.example.com/a.js">',
        '<link rel="stylesheet" href="//fonts.example.com/css">',
        "@import 'https://example.com/a.css'",
        "background: url(https://example.com/a.png)",
    ],
)
def test_what_would_be_loaded_is_seen(text: str) -> None:
    assert FETCHED.search(text) is not None


def test_formulas_are_text(site: Path) -> None:
    theory = page(site, "theory.html")
    assert "‖p − z*‖₂ ≤ ‖W e‖₂ / m" in theory
    assert "mathjax" not in theory.lower()
    pages = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
    emphasised = re.findall(r"<em>(.*?)</em>", re.sub(r"<code>.*?</code>", "", pages, flags=re.DOTALL), re.DOTALL)
    assert emphasised
    assert [words for words in emphasised if re.search("[‖−≤*]", words)] == [], "a star or underscore of a formula"


def test_no_markup_is_left_over(site: Path) -> None:
    """Roles, references that lead nowhere, emphasis and lists that were not recognised."""
    for path in site.rglob("*.html"):
        text = re.sub(r"<(script|style|svg|pre)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = re.sub(r"<[^>]+>", "", re.sub(r"<code>.*?</code>", "CODE", text, flags=re.DOTALL))
        found = re.search(r":\w+:CODE|``|\]\[|\]\(|\*\*|^\s*- |\. - [A-Z]", text, re.MULTILINE)
        assert found is None, f"{path}: {text[max(found.start() - 60, 0) : found.end() + 60]!r}"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing of it."""

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site, served."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    binary = chromium()
    if binary is None:
        pytest.skip("no Chromium: chromium, chromium-browser, google-chrome")
    with browser(binary, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_pages_fit_desktop_and_phone_and_complain_of_nothing(site: Path, address: str, tab: Tab) -> None:
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    pages.remove("404.html")  # its addresses are those of a site at the root
    generated = [name for name in pages if name.startswith("api/")]  # much alike: the two longest stand for them
    for built in [name for name in pages if name not in generated] + ["api/layers.html", "api/proofs.html"]:
        tab.resize(1400, 900)
        tab.open(address + built)
        for width in (1400, 400):
            tab.resize(width, 900)
            assert tab.value("document.documentElement.scrollWidth") <= width, (built, width)
        assert tab.complaints() == [], built
        assert [url for url in tab.requests() if not url.startswith((address, "data:", "blob:"))] == []


def test_the_search_finds_a_function(address: str, tab: Tab) -> None:
    tab.resize(1400, 900)
    tab.open(address + "index.html")
    tab.click(".md-search__input")
    tab.call("Input.insertText", text="displacement")
    found, patience = "document.querySelectorAll('.md-search-result__item').length", time.monotonic() + 30
    while tab.value(found) == 0 and time.monotonic() < patience:
        time.sleep(0.1)
    assert tab.value(found) > 3
    assert "isplacement" in tab.text(".md-search-result__list")


def test_a_prompt_is_not_copied_with_its_command(address: str, tab: Tab) -> None:
    tab.open(address + "index.html")
    code = "document.querySelector('code:has(.gp)')"
    assert tab.value(f"{code}.innerText").startswith("$ equipoise")
    assert tab.value(f"{code}.setAttribute('data-md-copying', ''), {code}.innerText").startswith("equipoise")
