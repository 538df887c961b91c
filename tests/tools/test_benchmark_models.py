"""The command line of the table of speeds, in small on the CPU."""

import json

import pytest
from torch import nn

from mmvssm.analysis import benchmark
from tests.tools.conftest import load_tool

OPTIONS = ["--sizes", "16", "16x32:1", "--dtype", "fp32", "--repeats", "1", "--warmup", "1", "--batch-size", "2"]
OPTIONS += ["--device", "cpu"]


@pytest.fixture
def tool(monkeypatch):
    """The tool with models that take no time."""

    def build_classifier(name, size, device):
        if name == "vigh-tiny":
            raise ValueError("it is broken")
        return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten())

    monkeypatch.setattr(benchmark, "build_classifier", build_classifier)
    return load_tool("analysis_tools/benchmark_models")


def test_table_files_and_picture(tool, tmp_path, capsys):
    table, picture, page = tmp_path / "speed.json", tmp_path / "speed.png", tmp_path / "speed.md"
    files = ["--json", str(table), "--plot", str(picture), "--markdown", str(page)]
    crossover = ["--crossover", "vim-tiny", "vig-tiny"]
    modes = ["--modes", "inference", "training"]
    assert tool.main(["vim-tiny", "vig-tiny", *OPTIONS, *modes, *crossover, *files]) == 0
    rows = json.loads(table.read_text())["rows"]
    assert [(r["height"], r["width"], r["batch"], r["model"], r["mode"]) for r in rows] == [
        (*size, model, mode)
        for size in ((16, 16, 2), (16, 32, 1))
        for model in ("vim-tiny", "vig-tiny")
        for mode in ("inference", "training")
    ]
    assert picture.stat().st_size > 10_000
    assert len(page.read_text().splitlines()) == 2 + 8
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(json.loads(table.read_text())["device"])
    assert "warmup 1, repeats 1" in printed[1]
    assert sum("images/s" in text for text in printed) == 8
    assert sum(text.startswith("vim-tiny is faster than vig-tiny ") for text in printed) == 2
    assert len(json.loads((tmp_path / "speed.crossovers.json").read_text())) == 2

    # The same from the file, without measuring; and continuing it measures nothing more.
    again = tmp_path / "again.md"
    assert tool.main(["--from", str(table), "--markdown", str(again), *crossover]) == 0
    assert again.read_text() == page.read_text()
    capsys.readouterr()
    assert tool.main(["vim-tiny", "vig-tiny", *OPTIONS, *modes, "--json", str(table), "--resume"]) == 0
    assert "images/s" not in capsys.readouterr().out


def test_broken_model_does_not_end_the_run(tool, capsys):
    assert tool.main(["vigh-tiny", "vim-tiny", *OPTIONS]) == 3
    printed = capsys.readouterr().out
    assert printed.count("error: ValueError: it is broken") == 2
    assert printed.count("images/s") == 2


def test_total_seconds(tool, tmp_path, capsys):
    """What comes after the measuring still works with what there is, be it nothing."""
    more = ["--total-seconds", "-1", "--crossover", "vim-tiny", "vig-tiny", "--plot", str(tmp_path / "p.png")]
    assert tool.main(["vim-tiny", "vig-tiny", *OPTIONS, *more, "--markdown", str(tmp_path / "p.md")]) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 cells were not begun" in printed
    assert "no crossover of vim-tiny and vig-tiny" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["p.md"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["vim-tiny", "--execution", "graph", "--device", "cpu"], "CUDA graphs need a GPU"),
        (["vim-tinny", "--device", "cpu"], "no model named 'vim-tinny'"),
        (["vim-tiny", "--device", "cpu", "--sizes", "12y"], "sizes are given as"),
        (["vim-tiny", "--device", "cpu", "--repeats", "0"], "--repeats must be at least 1"),
        (["vim-tiny", "--device", "cpu", "--resume"], "--json has to name"),
        (["vim-tiny", "--device", "cpu", "--crossover", "vim-tiny", "b"], "--crossover: b is not among the models"),
        ([], "give either models to measure or --from"),
        (["--from", "a.json", "--json", "b.json"], "--from measures nothing"),
        (["--from", "nowhere.json"], "no table nowhere.json"),
    ],
)
def test_mistakes(tool, capsys, options, sentence):
    assert tool.main(options) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ")
    assert sentence in told
