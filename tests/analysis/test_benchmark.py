"""Tables of speeds: cells, what is kept of a run that ends early, cells that fail; texts, crossovers and curves."""

import json
import math

import pytest
import torch
from torch import nn

from mmvssm.analysis import benchmark
from mmvssm.analysis.benchmark import Protocol, Size, cells_of, read_table, run_cells
from mmvssm.analysis.comparison import find_crossovers, line, markdown, plot
from mmvssm.analysis.speed import Speed

CPU = Protocol(device="cpu", warmup=1, repeats=2)


class Linear(nn.Module):
    """A classifier that fits for up to two images, or fails."""

    def __init__(self, fails=False):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 8, 8)
        self.fails = fails

    def forward(self, x):
        if self.fails:
            raise ValueError("wrong\n  shape")
        if len(x) > 2:
            raise torch.OutOfMemoryError("too much")
        return self.layer(x)


@pytest.fixture
def built(monkeypatch):
    """Names and sizes of the models that were built."""
    built = []

    def build_classifier(name, size, device):
        built.append((name, *size))
        return Linear(name == "failing")

    monkeypatch.setattr(benchmark, "build_classifier", build_classifier)
    return built


@pytest.mark.parametrize(
    ("text", "batch", "expected"),
    [
        ("224", None, (224, 224, 128)),
        ("448", None, (448, 448, 32)),
        ("800x1216", None, (800, 1216, 6)),
        ("800x1216:2", 5, (800, 1216, 2)),
        ("512", 5, (512, 512, 5)),
        ("9000", None, (9000, 9000, 1)),
    ],
)
def test_sizes(text, batch, expected):
    assert Size.parse(text, batch) == expected


@pytest.mark.parametrize("text", ["", "x", "224x", "0", "224:0", "1x2x3", "-5", "224:two"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="sizes are given as"):
        Size.parse(text)


def test_rows(built, tmp_path):
    sizes = [Size(16, 16, 2), Size(8, 24, 4)]
    cells = cells_of(["a", "failing"], sizes, ("inference", "training"), ("fp32",))
    assert [(cell.size, cell.model) for cell in cells[::2]] == [(s, m) for s in sizes for m in ("a", "failing")]
    assert cells_of(["a@folded"], sizes, ("training",)) == []
    seen = []
    rows = run_cells(cells, CPU, tmp_path / "t.json", report=seen.append)
    assert rows == seen
    assert [(r["model"], r["status"]) for r in rows] == [("a", "measured")] * 2 + [("failing", "error")] * 2 + [
        ("a", "measured")
    ] * 2 + [("failing", "error")] * 2
    assert [r["batch"] for r in rows if r["model"] == "a"] == [2, 2, 2, 2]  # four of 8 x 24 did not fit
    assert [r["asked_batch"] for r in rows if r["model"] == "a"] == [2, 2, 4, 4]
    assert rows[2]["error"] == "ValueError: wrong shape"
    assert built.count(("a", 16, 16)) == 1  # neighbouring cells share a model
    facts, kept = read_table(tmp_path / "t.json")
    assert kept == rows
    assert facts["protocol"]["repeats"] == 2
    assert facts["tf32"].keys() == {"matmul", "convolutions"}
    assert facts["versions"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [tmp_path / "t.json"]


def test_not_even_one_image_fits(built, monkeypatch):
    tried = []

    def measure_speed(model, images, *_, **__):
        tried.append(len(images))
        try:
            raise torch.OutOfMemoryError("too much")
        except torch.OutOfMemoryError:
            if len(images) == 1:  # as when a graph was being captured
                raise RuntimeError("capture failed") from None
            raise

    monkeypatch.setattr(benchmark, "measure_speed", measure_speed)
    (row,) = run_cells(cells_of(["a"], [Size(8, 8, 5)]), CPU)
    assert tried == [5, 2, 1]
    assert row["status"] == "does not fit"


def test_killed_run_is_continued(built, tmp_path):
    path = tmp_path / "t.json"
    cells = cells_of(["a", "failing"], [Size(16, 16, 1), Size(24, 24, 1)], dtypes=("fp32",))

    def killed(row):
        if row["height"] == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, CPU, path, report=killed)
    _, kept = read_table(path)
    assert [(r["model"], r["height"]) for r in kept] == [("a", 16), ("failing", 16), ("a", 24)]
    built.clear()
    rows = run_cells(cells, CPU, path, resume=True)
    assert built == [("failing", 16, 16), ("failing", 24, 24)]
    assert [r for r in rows if r["model"] == "a"] == [kept[0], kept[2]]
    with pytest.raises(ValueError, match="was measured with protocol"):
        run_cells(cells, Protocol(device="cpu", repeats=3), path, resume=True)


def test_time_limit_of_the_run(built):
    cells = cells_of(["a"], [Size(8, 8, 1), Size(16, 16, 1)], dtypes=("fp32",))
    assert run_cells(cells, CPU, seconds=-1.0) == []
    assert len(run_cells(cells, CPU, seconds=100.0)) == 2


def test_switches_hold_during_the_run_only(built, monkeypatch):
    seen = []

    def measure_speed(model, images, *_, **__):
        cudnn = torch.backends.cudnn
        layout = images.is_contiguous(memory_format=torch.channels_last)
        seen.append((torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, layout))
        return Speed(1.0, 1.0, 1.0)

    monkeypatch.setattr(benchmark, "measure_speed", measure_speed)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    cells = cells_of(["a"], [Size(8, 8, 1)])
    run_cells(cells, Protocol(device="cpu", tf32="on", cudnn_benchmark=True, channels_last=True))
    run_cells(cells, Protocol(device="cpu", tf32="off"))
    run_cells(cells, CPU)
    assert seen[:2] == [("high", True, True, True), ("highest", False, False, False)]
    assert seen[2][:2] == before[:2]
    assert before == (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.parametrize("text", ["[]", "{}", '{"rows": [1]}', '{"rows": [{"model": "a"}]}', "no"])
def test_other_files_are_no_tables(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match="is no table of speeds"):
        read_table(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError, match=r"There is no table .*none\.json"):
        read_table(tmp_path / "none.json")


def row(model, side, ms, mib, batch=1, **changes):
    """A row; ms None does not fit."""
    fits = ms is not None
    values = dict(model=model, mode="inference", height=side, width=side, asked_batch=4, dtype="fp16")
    values |= dict(execution="eager", status="measured" if fits else "does not fit")
    if fits:
        values |= dict(batch=batch, images_per_second=1e3 * batch / ms, ms=ms, p90=ms, p99=ms, kernel_ms=None, mib=mib)
    return values | changes


ROWS = [
    row("a", 224, 4.0, 8.0, batch=4),
    row("b", 224, 2.0, 16.0, batch=4),
    row("a", 1024, 9.0, 9.0),
    row("b", 1024, 18.0, 90.0),
    row("a", 512, 3.0, 9.0),
    row("b", 512, 3.0, 9.0),
    row("a", 2048, 20.0, 10.0),
    row("b", 2048, None, None),
    row("b", 4096, None, None),
]


def test_crossovers():
    time, memory = find_crossovers(ROWS, "a", "b")
    assert (time.metric, memory.metric) == ("time", "memory")
    assert time.ratios == {"224": 0.5, "512": 1.0, "1024": 2.0, "2048": math.inf}
    assert time.size == "1024"
    assert memory.size == "1024"  # ahead at 224, but not at 512
    assert memory.ratios["224"] == 2.0
    assert "a is faster than b from 1024 px on (inference, fp16, eager; 224: 0.50x" in str(time)
    assert "2048: the other does not fit" in str(time)
    json.dumps(time.as_dict(), allow_nan=False)

    time, memory = find_crossovers(ROWS, "b", "a")
    assert time.size is None
    assert "b is faster than a at 224 px, but not above" in str(time)
    assert "b is smaller in memory than a at no size up to 2048 px" in str(memory)
    assert time.ratios["2048"] == 0.0
    with pytest.raises(ValueError, match="no model 'c' to compare; measured: a, b"):
        find_crossovers(ROWS, "a", "c")


def test_crossover_at_all_sizes():
    first = find_crossovers([row("a", 8, 1.0, 0.0), row("b", 8, 3.0, 0.0)], "a", "b")
    assert [str(c) for c in first] == ["a is faster than b at 8 px (inference, fp16, eager; 8: 3.00x)"]


def test_texts():
    assert line(ROWS[0]).split("batch")[1].split() == [
        "4", "1000.0", "images/s", "4.00", "ms", "(p90", "4.00,", "p99", "4.00)", "8", "MiB",
    ]  # fmt: skip
    assert line(ROWS[-1]).endswith("does not fit")
    assert line(row("a", 8, None, None, status="error", error="ValueError: no")).endswith("error: ValueError: no")
    table = markdown([row("a", 224, 2.0, 16.0, batch=4, kernel_ms=1.5, width=96), ROWS[-1]]).splitlines()
    assert table[2] == "| a | inference | 224x96 | 4 | fp16 | eager | 2000.0 | 2.00 | 2.00 | 2.00 | 1.50 | 16 |"
    assert table[3] == "| b | inference | 4096 | - | fp16 | eager | does not fit | - | - | - | - | - |"
    assert len({text.count("|") for text in table}) == 1


def test_plot(tmp_path):
    from PIL import Image

    rows = [*ROWS, row("a", 224, 2.0, 8.0, execution="graph"), row("a", 512, 2.0, 8.0, mode="training")]
    plot(rows, tmp_path / "p.png", "a machine", find_crossovers(rows, "a", "b"))
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 1000  # time and memory side by side
        assert picture.height > 800  # inference above training
        colours = {colour for count, colour in picture.convert("RGB").getcolors(1 << 20) if count > 100}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    with pytest.raises(ValueError, match="nothing to draw"):
        plot(ROWS[-1:], tmp_path / "q.png")


@pytest.mark.parametrize("executions", [["eager", "graph"], ["graph"]], ids="-".join)
def test_plot_has_one_memory_curve_for_each_model(executions, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, label, **kwargs: drawn.append((label, y)))
    plot([row("a", 224, 2.0, 8.0, execution=how) for how in executions], tmp_path / "p.png")
    times = [(f"a ({how})", [2.0]) for how in executions]
    assert drawn == [*times, (f"a ({executions[0]})", [8.0])]
