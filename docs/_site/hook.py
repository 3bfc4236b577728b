"""What mkdocs is told beyond mkdocs.yml: pages made from the package, and Markdown read as GitHub reads it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import commands
from cells import page
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "equipoise"
BORROWED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
CDN = re.compile(r"https://[\w.-]+/(?:mermaid@|resize-observer-polyfill)[\w@./-]*")
"""What the theme would fetch for diagrams, of which there are none, and for browsers that nobody has any more."""


def public_names() -> dict[str, list[str]]:
    """The public names by the room that they come from, read from the imports of the package's ``__init__``."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    rooms: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                rooms.setdefault(node.module or alias.name, []).append(alias.name)
    return dict(sorted(rooms.items()))


def defined_at(name: str, room: str) -> str:
    """The dotted path where ``name`` is defined: rooms import it from their modules, which may bear its name."""
    package = PACKAGE / room
    if not package.is_dir():
        module = f"equipoise.{room}"
        return module if name == room and name not in _tops(PACKAGE / f"{room}.py") else f"{module}.{name}"
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {alias.name for alias in node.names}:
            return f"equipoise.{room}.{node.module}.{name}"
    return f"equipoise.{room}.{name}"


def _tops(path: Path) -> set[str]:
    """The functions and classes that a module defines."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def targets() -> dict[str, str]:
    """For each public name, where its documentation is found."""
    return {name: defined_at(name, room) for room, names in public_names().items() for name in names}


def named_in_theorems() -> set[str]:
    """The dotted names of docs/theorems.md that name a room."""
    text = (ROOT / "docs" / "theorems.md").read_text(encoding="utf-8")
    return set(re.findall(r"`(equipoise(?:\.\w+){2,})`", text))


def proof_names() -> list[str]:
    """Those of them that are neither public nor part of what is: they get a page of their own."""
    public = tuple(f"{target}." for target in targets().values())
    return sorted(name for name in named_in_theorems() if not f"{name}.".startswith(public))


def api_pages() -> dict[str, str]:
    """The API reference: a page per room, and one of the functions that compute what theory proves."""
    pages = {}
    for room, names in public_names().items():
        path = PACKAGE / room / "__init__.py"
        source = path if path.exists() else PACKAGE / f"{room}.py"
        about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        if targets().get(room) == f"equipoise.{room}":  # the room itself is public, and says so below
            about = ""
        entries = "\n\n".join(
            f"::: {defined_at(name, room)}\n    options: {{ heading: equipoise.{name} }}" for name in names
        )
        pages[f"api/{room}.md"] = f"# {room}\n\n{about}\n\n{entries}\n"
    entries = "\n\n".join(
        f"::: {name}\n    options: {{ show_source: true, show_root_full_path: true }}" for name in proof_names()
    )
    pages["api/proofs.md"] = (
        "# Functions that prove\n\nWhat [the theorems](../theorems.md) name and is not public: it may change between"
        f" versions. The source is shown, since it is the proof.\n\n{entries}\n"
    )
    return pages


def tutorials() -> list[Path]:
    return sorted((ROOT / "docs" / "tutorials").glob("*.py"))


def on_config(config: Any) -> Any:
    """Fill the navigation, and have Markdown read as on GitHub."""
    known = re.findall(r"[\w/]+\.md", str(config.nav))
    others = sorted(p.name for p in (ROOT / "docs").glob("*.md") if p.name not in known)
    filled = {
        "Tutorials": [f"tutorials/{p.stem}.md" for p in tutorials()],
        "API": list(api_pages()),
    }
    for section in config.nav:
        for title in section:
            section[title] = filled.get(title, section[title])
            if title == "Guides":
                section[title] += [name for name in others if name not in section[title]]
    config.markdown_extensions.append(Dialect())
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made and not written."""
    pages = api_pages() | {f"tutorials/{p.stem}.md": page(p) for p in tutorials()}
    for name, source in BORROWED.items():
        pages[name] = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the commands and their options where their page has the mark."""
    return markdown.replace(commands.MARK, commands.reference()) if page.file.src_uri == "commands.md" else markdown


def on_post_build(config: Any) -> None:
    """Take out of the theme's scripts what would ask another host, and the maps that only its authors need."""
    for path in Path(config.site_dir).rglob("*"):
        if path.suffix == ".map":
            path.unlink()
        elif path.suffix in (".js", ".css"):
            text = path.read_text(encoding="utf-8")
            text = re.sub(r"\n?(//|/\*)# sourceMappingURL=\S+( \*/)?", "", text)
            path.write_text(CDN.sub("", text), encoding="utf-8")


def slug(title: str, separator: str) -> str:
    """The anchor of a heading: ``section-5`` of a numbered one, whatever its words, else as GitHub makes it."""
    if numbered := re.match(r"(\d+)\. ", title):
        return f"section-{numbered[1]}"
    return re.sub(r"[^\w\- ]", "", title.lower().strip()).replace(" ", separator)


class Dialect(Extension):
    """Markdown as GitHub reads it, and references in docstrings as links."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(Links(md), "equipoise-links", 24)  # after code blocks were put aside
        md.preprocessors.register(Lists(md), "equipoise-lists", 23)
        stars = r"(?<![\w*])\w[\u0300-\u036f]?\*(?!\*)|(?<=[‖)}])_"
        md.inlinePatterns.register(Plain(stars, md), "equipoise-plain", 175)  # after code, before emphasis


class Plain(InlineProcessor):
    """The star of z* and the underscore of ‖·‖_η are themselves: no emphasis begins or ends there."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        return m[0], m.start(), m.end()


class Links(Preprocessor):
    """``theory §5``, roles such as ``:class:`Solution``` and dotted names of the package become links."""

    def __init__(self, md: Markdown) -> None:
        super().__init__(md)
        self.known = {name: name for name in named_in_theorems()}
        for name, target in targets().items():
            self.known |= dict.fromkeys((name, f"eq.{name}", f"equipoise.{name}", target), target)

    def run(self, lines: list[str]) -> list[str]:
        return [line if line.startswith("    ") else self._linked(line) for line in lines]

    def _linked(self, line: str) -> str:
        line = re.sub(r"\[([Tt]heory §(\d+)[^\]]*)\]\(((?:\.\./)?theory\.md)\)", r"[\1](\3#section-\2)", line)
        line = re.sub(r"(?<!\[)\b([Tt]heory §(\d+))", r"[\1][section-\2]", line)
        line = re.sub(r"\]\((tutorials/\w+)\.py\)", r"](\1.md)", line)
        line = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", line)
        return re.sub(r"(?<![\[`])`((?:equipoise|eq)\.[\w.]+|[A-Z]\w+)`(?!`)", self._link, line)

    def _link(self, m: re.Match[str]) -> str:
        target = self.known.get(m[1])
        return m[0] if target is None else f"[{m[0]}][{target}]"


class Lists(Preprocessor):
    """A list may follow its paragraph without a blank line, and what belongs to an item is indented by its marker."""

    def run(self, lines: list[str]) -> list[str]:
        found: list[str] = []
        item, loose = 0, False  # the width of the marker of the item that we are in; whether it has paragraphs
        for line in lines:
            if marker := re.match(r"([-*]|\d+\.) +", line):
                if found and found[-1].strip() and (loose or not item):
                    found.append("")
                item, loose = len(marker[0]), False
            elif line.strip() and not line.startswith(" "):
                item = 0
            elif item and line.startswith(" " * item):
                line = " " * (4 - item) + line
            loose = loose or not line.strip()
            found.append(line)
        return found
