import pytest

pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")

from mmvssm.compat import announce, pieces


class FakeLogger:
    def __init__(self):
        self.lines = []

    def info(self, line):
        self.lines.append(line)


class FakeRunner:
    def __init__(self):
        self.logger = FakeLogger()

    def train(self, scale):
        return 2 * scale

    def val(self):
        return "val"


def test_one_line_per_process(monkeypatch):
    monkeypatch.setattr(announce, "_announced", False)
    module = type("module", (), {"Runner": type("Runner", (FakeRunner,), {})})
    announce._extend("Runner", module)
    announce._extend("Runner", module)  # a second time changes nothing
    runner = module.Runner()
    assert (runner.train(scale=2), runner.val()) == (4, "val")
    assert runner.logger.lines == [pieces.summary()]


def test_both_runners_of_mmengine_announce():
    from mmengine.runner import FlexibleRunner, Runner

    for runner in (Runner, FlexibleRunner):
        assert all(hasattr(getattr(runner, job), "_mmvssm_announces") for job in ("train", "val", "test"))


def test_summary_names_active_pieces_only(monkeypatch):
    monkeypatch.setattr(pieces, "_PIECES", {})
    assert pieces.summary() == "mmvssm compatibility: nothing active"
    first = pieces.register("first", "why", "until")
    second = pieces.register("second", "why", "until")
    first.activate("did this")
    first.stand_by("must not undo it")
    second.stand_by("nothing to do")
    assert pieces.summary() == "mmvssm compatibility: first (did this)"
    assert [piece.detail for piece in pieces.all_pieces()] == ["did this", "nothing to do"]
