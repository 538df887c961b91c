"""The documentation site builds without a warning, and holds every page of the repository."""

import importlib.util
import logging

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site_hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, monkeypatch, **settings):
    """Build the site into ``folder`` as ``mkdocs build --strict`` does, in this process."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)  # mkdocstrings takes its paths from here
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True, **settings)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)


@pytest.fixture(scope="module")
def site(hook, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        build(folder, patch)
    return folder


def test_every_page_is_built(site, hook):
    own = {page.stem for page in (ROOT / "docs").glob("*.md")}
    outside = {uri.removesuffix(".md") for uri in hook.outside_pages()}
    assert {"zoo/vim", "zoo/vmamba", "zoo/mambavision", "zoo/vig", "kernels/add_norm", "changelog"} <= outside
    for name in own | outside:
        page = site / name.removesuffix("index") / "index.html"
        assert page.is_file(), f"{name} is not in the site"
    assert "Visual state-space backbones for MMEngine" in (site / "index.html").read_text()
    assert (site / "images" / "demo.jpg").is_file()
    assert not list(site.rglob("*.py"))


def test_api_page_shows_the_docstrings(site):
    text = (site / "api" / "index.html").read_text()
    for name in ("list_models", "extract_features", "VMamba", "ViGH", "export_onnx", "bidirectional_gla"):
        assert f">{name}<" in text.replace("</span>", "<"), name
    assert "Shell-style pattern for the name" in text
    assert ":class:" not in text
    assert "::: mmvssm" not in text


def test_a_link_that_leads_nowhere_fails(hook, tmp_path, monkeypatch):
    """The build is strict: what the other tests rest on."""
    from mkdocs.exceptions import Abort

    monkeypatch.setattr(logging.getLogger("mkdocs"), "propagate", False)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[x](none.md)\n")
    settings = dict(docs_dir=str(tmp_path / "docs"), nav=None, hooks=[], plugins=[])
    with pytest.raises(Abort):
        build(tmp_path / "site", monkeypatch, **settings)


def test_links_follow_their_pages(hook):
    pages = hook.outside_pages()

    def rewrite(text, file, uri, repo_url=None):
        return hook.rewrite_links(text, ROOT / file, uri, pages, repo_url)

    assert rewrite("![x](docs/images/demo.jpg)", "README.md", "index.md") == "![x](images/demo.jpg)"
    assert rewrite("[a](docs/train.md#data)", "README.md", "index.md") == "[a](train.md#data)"
    assert rewrite("[k](../configs/vim/README.md)", "docs/train.md", "train.md") == "[k](zoo/vim.md)"
    assert rewrite("[k](../vmamba)", "configs/_examples_/README.md", "zoo/examples.md") == "[k](vmamba.md)"
    text = "[op](mmvssm_kernels/add_norm/README.md)"
    assert rewrite(text, "kernels/README.md", "kernels/index.md") == "[op](add_norm.md)"
    assert rewrite("[licence](LICENSE)", "README.md", "index.md") == "licence"
    linked = rewrite("[licence](LICENSE)", "README.md", "index.md", "https://example.org/mmvssm/")
    assert linked == "[licence](https://example.org/mmvssm/blob/main/LICENSE)"
    kept = "[w](https://example.org) [h](#here) [n](none.md)\n```text\n[a](docs/train.md)\n```\n"
    assert rewrite(kept, "README.md", "index.md") == kept


def test_lists_are_separated_from_text(hook):
    assert hook.separate_lists("Facts:\n- a\n  b\n- c\n") == "Facts:\n\n- a\n  b\n- c\n"
    assert hook.separate_lists("Next:\n1. a\n2. b\n") == "Next:\n\n1. a\n2. b\n"
    code = "```text\nx\n- y\n```\n"
    assert hook.separate_lists(code) == code
