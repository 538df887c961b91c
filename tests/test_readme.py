"""README and docs: their Python runs, their commands are accepted, links lead somewhere, tables are whole.

That commands also do what they should is tested in test_docs_commands.py.
"""

import argparse
import functools
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.configs.conftest import keep_metafiles
from tests.helpers import ROOT
from tests.tools.conftest import load_tool

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "kernels").rglob("*.md"))]
LINKING_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("configs/*/*.md"))]
# What a block may say that it needs, in a comment before it: then it is not executed by the tests of the pages.
NEEDS = {
    "data": "data sets, or files that a run on them has written",
    "gpu": "a GPU, several, or a cluster",
    "network": "a download",
    # tests/packaging/test_install.py installs the package, .ci/run starts quickstart.py for both lines of packages.
    "install": "an environment to change",
    "tests": "the tests, which are running",
}
BLOCK = re.compile(r"(?:<!-- needs: ([a-z, ]+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Words that stand for something of the user's.
PLACEHOLDERS = {"CONFIG", "CHECKPOINT", "SOURCE", "TARGET", "PARTITION", "JOB_NAME", "WORK_DIR", "FILE", "REPOSITORY"}
# Launching scripts: the tool they start, and which of their arguments it gets before all further ones.
LAUNCHERS = {
    "tools/dist_train.sh": ("tools/train.py", ["CONFIG", None]),
    "tools/dist_test.sh": ("tools/test.py", ["CONFIG", "CHECKPOINT", None]),
    "tools/slurm_train.sh": ("tools/train.py", [None, None, "CONFIG", None]),
    "tools/slurm_test.sh": ("tools/test.py", [None, None, "CONFIG", "CHECKPOINT"]),
}
# Commands of other projects and of the shell, which are not examined.
FOREIGN = {".", "cd", "export", "git", "pre-commit", ".ci/run"}
OUR_FOLDERS = ("configs/", "docs/", "kernels/", "mmvssm/", "tests/", "tools/", ".ci/")


def blocks(language: str, pages=PAGES) -> list:
    """Parameters (what the block needs, its text) of every block in a language."""
    found = []
    for page in pages:
        for match in BLOCK.finditer(page.read_text()):
            if match[2] == language:
                line = page.read_text()[: match.start(3)].count("\n") + 1
                found.append(pytest.param(match[1], match[3], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize(("needs", "code"), blocks("python"))
def test_python_runs(needs, code, tmp_path, monkeypatch):
    """Configs are read as such; what needs data, a GPU or a network is compiled only."""
    from mmvssm.registry import MODELS

    compiled = compile(code, "block", "exec")
    if needs is not None:
        assert set(needs.split(", ")) <= set(NEEDS), f"needs: {needs}"
        return
    monkeypatch.chdir(tmp_path)
    if code.startswith("_base_"):
        from mmengine.config import Config

        keep_metafiles(monkeypatch)
        (tmp_path / "config.py").write_text(code)
        assert Config.fromfile(tmp_path / "config.py").model.backbone.type == "mmvssm.VMamba"
    else:
        import mmvssm.models  # noqa: F401  fills the registry

        monkeypatch.setattr(MODELS, "_module_dict", dict(MODELS.module_dict))  # what the block registers goes again
        exec(compiled, {"__name__": "block"})


class _Parsed(Exception):
    """Carries what a tool's parser made of its arguments."""


def parse_by_tool(tool: str, argv: list[str], monkeypatch) -> tuple[argparse.Namespace, list[str]]:
    """Start a tool and stop it when its arguments are parsed; a mistake among them ends in SystemExit."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, args=None, namespace=None):
        raise _Parsed(*original(self, args, namespace))

    def parse_args(self, args=None, namespace=None):
        namespace, rest = original(self, args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {rest}")
        raise _Parsed(namespace, rest)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [tool, *argv])
        module = load_tool(tool.removeprefix("tools/").removesuffix(".py"))
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(_Parsed) as parsed:
            module.main()
    return parsed.value.args


def check_command(words: list[str], monkeypatch) -> None:
    """A command must start a file that exists, with arguments that it accepts."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words or words[0] in FOREIGN:
        return
    for word in words:
        if word.startswith(OUR_FOLDERS):
            assert (ROOT / word).exists(), f"{word} does not exist"
    if words[0] == "pip":
        assert words[1] == "install"
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra
        return
    if words[0] in ("python", "python3") and words[1:3] == ["-m", "venv"]:
        return
    if words[0] == "pytest":
        assert not [word for word in words[1:] if word.startswith("-") and word != "-m"]
        return
    if words[0] in LAUNCHERS:
        tool, taken = LAUNCHERS[words[0]]
        assert len(words) > len(taken), f"{words[0]} takes at least {len(taken)} arguments"
        passed = [word for word, name in zip(words[1:], taken, strict=False) if name is not None]
        words = ["python", tool, *passed, *words[1 + len(taken) :]]
    assert words[0] in ("python", "python3"), f"{words[0]} is not examined by this test"
    assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
    check_tool(words[1], words[2:], monkeypatch)


def check_tool(tool: str, argv: list[str], monkeypatch) -> None:
    if not tool.startswith("tools/"):
        text = (ROOT / tool).read_text()
        assert all(f'"{word}"' in text for word in argv if word.startswith("-")), f"{tool} has not all of {argv}"
        return
    parsed, rest = parse_by_tool(tool, argv, monkeypatch)
    if rest:  # what quickstart.py hands on
        assert parsed.command == "demo", f"{tool}: {rest}"
        parse_by_tool("tools/demo.py", rest, monkeypatch)
    if str(getattr(parsed, "config", "CONFIG")) not in PLACEHOLDERS:
        from mmvssm.utils import cli

        cfg = cli.load_config(str(ROOT / parsed.config), parsed.cfg_options, getattr(parsed, "data_root", None))
        assert cli.task_of(cfg)


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block: comments and line breaks gone, variables filled in, `&&` and `;` split."""
    variables = {"(nproc)": "2"}
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in sorted(variables.items(), reverse=True):
            line = line.replace(f"${name}", value)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        found.append([])
        for word in lexer:
            if set(word) <= set("&;"):
                found.append([])
            else:
                found[-1].append(word)
        if len(found[-1]) == 1 and (assignment := re.fullmatch(r"([A-Z_]+)=(.*)", found[-1][0])):
            variables[assignment[1]] = assignment[2]
    return [command for command in found if command]


@pytest.mark.parametrize(("needs", "text"), blocks("bash", LINKING_PAGES))
def test_commands_are_accepted(needs, text, monkeypatch):
    keep_metafiles(monkeypatch)
    assert commands(text)
    for command in commands(text):
        check_command(command, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python tools/train.py CONFIG --ampp",
        "python tools/trian.py CONFIG",
        "python tools/test.py CONFIG",
        "tools/dist_train.sh CONFIG",
        "tools/dist_train.sh CONFIG 8 --resumee",
        "python tools/train.py configs/vmamba/none.py",
        "python3 tools/quickstart.py trial",
        "python3 tools/quickstart.py demo --itres 5",
        "cd x && python tools/demo.py --iters none",
        'pip install -e ".[everything]"',
        "unknown --flag",
    ],
)
def test_the_check_of_commands_sees_mistakes(line, monkeypatch):
    words = commands(line)[-1]
    with pytest.raises((AssertionError, SystemExit)):
        check_command(words, monkeypatch)


@functools.cache
def anchors(page: Path) -> set[str]:
    """Anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+://", link)]
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(file), f"{path} has no heading for #{anchor}"


def test_tables_of_the_readme_are_whole():
    from mmvssm import compat
    from mmvssm.engine.layer_decay import _PRESETS
    from mmvssm.models import VMamba

    text = (ROOT / "README.md").read_text()
    for arch in VMamba.arch_zoo:
        assert f"`{arch}`" in text
    for preset in _PRESETS:
        assert f"| `{preset}` |" in text
    section = text.split("## Compatibility layer")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)
    assert sorted(set(rows) - {"Piece"}) == sorted(piece.name for piece in compat.all_pieces())


@pytest.mark.parametrize("flags_of", ["train", "test"])
def test_train_page_lists_every_flag(flags_of, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        load_tool(flags_of).parse_args(["--help"])
    flags = set(re.findall(r"--[\w-]+", capsys.readouterr().out.split("options:")[1])) - {"--help"}
    text = (ROOT / "docs" / "train.md").read_text()
    assert not {flag for flag in flags if f"`{flag}" not in text}
