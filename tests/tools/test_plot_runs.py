"""The curves that are drawn, and what the tool says to mistakes."""

import json
import math

import cv2
import pytest

from tests.tools.conftest import load_tool


@pytest.fixture(scope="module")
def tool():
    return load_tool("analysis_tools/plot_runs")


def write_log(folder, rows, stamp="20260101_000000"):
    data = folder / stamp / "vis_data"
    data.mkdir(parents=True)
    (data / "scalars.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run_folder(tmp_path):
    """Losses 1, 0.99 ... at steps 10, 20 ... and one metric between them."""
    rows = [{"loss": 1 - i / 100, "lr": 0.1, "step": 10 * (i + 1)} for i in range(20)]
    rows.insert(10, {"coco/segm_mAP": 0.25, "step": 100})
    return write_log(tmp_path / "run", rows)


def test_reads_what_was_logged(tool, run_folder):
    steps, values = tool.read_curve(str(run_folder), "loss")
    assert steps == list(range(10, 201, 10))
    assert values == pytest.approx([1 - i / 100 for i in range(20)])
    assert tool.read_curve(str(run_folder), "coco/segm_mAP") == ([100], [0.25])
    file = run_folder / "20260101_000000" / "vis_data" / "scalars.json"
    assert tool.read_curve(str(file), "loss") == tool.read_curve(str(file.parents[1]), "loss") == (steps, values)


def test_resumed_run_replaces_what_it_repeats(tool, run_folder):
    write_log(run_folder, [{"loss": 5.0, "step": 190}, {"loss": 6.0, "step": 210}], stamp="20260102_000000")
    steps, values = tool.read_curve(str(run_folder), "loss")
    assert steps == [*range(10, 191, 10), 210]
    assert values[-2:] == [5.0, 6.0]


def test_unfinished_last_line_of_a_killed_run(tool, run_folder):
    file = run_folder / "20260101_000000" / "vis_data" / "scalars.json"
    whole = tool.read_curve(str(run_folder), "loss")
    file.write_text(file.read_text() + '{"loss": 0.1, "st')
    assert tool.read_curve(str(run_folder), "loss") == whole


def test_running_mean(tool):
    nan = math.nan
    assert tool.running_mean([4.0, 1.0, 1.0, 7.0], 3) == pytest.approx([nan, 2.0, 3.0, nan], nan_ok=True)
    assert tool.running_mean([4.0, 1.0, 7.0], 1) == [4.0, 1.0, 7.0]
    assert tool.running_mean([4.0, 1.0, 7.0], 5) == pytest.approx([nan, 4.0, nan], nan_ok=True)
    assert tool.running_mean([4.0, 1.0], 5) == [4.0, 1.0]
    assert tool.running_mean([math.inf, 2.0, math.inf, 4.0], 3) == pytest.approx([nan, 2.0, 3.0, nan], nan_ok=True)
    assert tool.running_mean([math.inf], 3) == pytest.approx([nan], nan_ok=True)


def test_picture_shows_every_run(tool, run_folder, tmp_path, capsys):
    other = write_log(tmp_path / "other", [{"loss": math.inf, "step": 10}, {"loss": 0.5, "step": 200}])
    out = tmp_path / "loss.png"
    runs = [f"first={run_folder}", f"second={other}"]
    assert tool.main([*runs, "--out", str(out), "--title", "two runs"]) == 0
    picture = cv2.cvtColor(cv2.imread(str(out)), cv2.COLOR_BGR2RGB)
    for colour in tool.COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(picture.astype(int) - rgb).max(axis=2) < 8).sum() > 50
    printed = capsys.readouterr().out
    assert "first: 20 points, last loss 0.81 at step 200\n" in printed
    assert "second: 2 points, last loss 0.5 at step 200, 1 not finite and left out\n" in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}"], "NAME=WORK_DIR"),
        (["a={run}", "a={run}"], "two runs are called 'a'"),
        (["a={run}/nowhere"], "holds no log"),
        (["a={run}", "--key", "los"], "did you mean loss?"),
        (["a={run}", "--key", "xyz"], "it has coco/segm_mAP, loss, lr, step"),
        (["a={run}", "--smooth", "4"], "--smooth takes an odd number"),
        (["a={run}", "--out", "{run}/nowhere/loss.png"], "cannot be written"),
        (["a={run}", "--out", "{run}/loss.doc"], "cannot be written"),
    ],
)
def test_mistakes_in_one_sentence(tool, run_folder, tmp_path, capsys, arguments, expected):
    given = [word.format(run=run_folder) for word in arguments]
    assert tool.main([*given, *([] if "--out" in given else ["--out", str(tmp_path / "loss.png")])]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ")
    assert expected in told


def test_broken_log(tool, tmp_path, capsys):
    for text in ("<html>\n{}\n", "[1]\n"):
        file = tmp_path / "scalars.json"
        file.write_text(text)
        assert tool.main([f"a={file}", "--out", str(tmp_path / "loss.png")]) == 2
        assert "record 1, is not" in capsys.readouterr().err
