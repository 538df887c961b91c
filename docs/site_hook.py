"""MkDocs hook: pages that lie outside docs/ are brought into the site, and links follow them.

The README is the front page, ``configs/<family>/README.md`` become ``zoo/<family>.md``, the pages of operators
``kernels/<operator>.md``. Nothing is copied in the repository, so every text exists once and reads on GitHub as well.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
_LIST_AFTER_TEXT = re.compile(r"^((?![-*] |\d+\. )\S.*)\n(?=[-*] |1\. )", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")


def outside_pages() -> dict[str, Path]:
    """Page of the site -> file outside docs/ that holds its text."""
    pages = {
        "index.md": ROOT / "README.md",
        "changelog.md": ROOT / "CHANGELOG.md",
        "contributing.md": ROOT / "CONTRIBUTING.md",
        "kernels/index.md": ROOT / "kernels" / "README.md",
        "kernels/notes.md": ROOT / "kernels" / "NOTES.md",
    }
    pages |= {f"zoo/{file.parent.name.strip('_')}.md": file for file in sorted(ROOT.glob("configs/*/README.md"))}
    pages |= {
        f"kernels/{file.parent.name}.md": file for file in sorted(ROOT.glob("kernels/mmvssm_kernels/*/README.md"))
    }
    return pages


def site_path(file: Path, pages: dict[str, Path]) -> str | None:
    """Where a file or folder of the repository is in the site; None if it is not part of it."""
    if file.is_dir():
        file = file / "README.md"
    for uri, source in pages.items():
        if source == file:
            return uri
    return file.relative_to(DOCS).as_posix() if file.is_relative_to(DOCS) and file.suffix != ".py" else None


def rewrite_links(text: str, source: Path, uri: str, pages: dict[str, Path], repo_url: str | None = None) -> str:
    """Links of a page as the site needs them.

    Args:
        text: Markdown with links relative to ``source``.
        source: File that holds it.
        uri: Page of the site that it becomes.
        pages: What :func:`outside_pages` gives.
        repo_url: Where files of the repository that are no pages can be seen; without it, their links become text.
    """

    def replace(match: re.Match) -> str:
        image, label, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"\w+:", target):
            return match[0]
        file = (source.parent / path).resolve()
        if not file.is_relative_to(ROOT) or not file.exists():
            return match[0]  # mkdocs reports it
        found = site_path(file, pages)
        if found is not None:
            target = posixpath.relpath(found, posixpath.dirname(uri) or ".")
            return f"{image}[{label}]({target}{hash_sign}{anchor})"
        if repo_url is None:
            return label
        return f"{image}[{label}]({repo_url.rstrip('/')}/blob/main/{file.relative_to(ROOT).as_posix()})"

    return _outside_fences(text, lambda part: _LINK.sub(replace, part))


def separate_lists(text: str) -> str:
    """A blank line before lists that follow a line of text, which GitHub does not need and Python-Markdown does."""
    return _outside_fences(text, lambda part: _LIST_AFTER_TEXT.sub(r"\1\n\n", part))


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if part.startswith("```") else change(part) for part in _FENCE.split(text))


def on_files(files, config):
    """Adds the pages from outside docs/."""
    for uri, source in outside_pages().items():
        files.append(File.generated(config, uri, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites a page from GitHub's Markdown and links to the site's."""
    pages, uri = outside_pages(), page.file.src_uri
    return separate_lists(rewrite_links(markdown, pages.get(uri, DOCS / uri), uri, pages, config.repo_url))


class SphinxHabits(griffe.Extension):
    """Docstrings say ``Example:``, which the parser knows in the plural only, and name objects by Sphinx roles."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = _ROLE.sub(lambda role: f"`{role[2].split('.')[-1] if role[1] else role[2]}`", text)
