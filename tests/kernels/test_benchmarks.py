"""The benchmark of the operators: floors, refusal of wrong results, files. Its times on a GPU are not tested here."""

import importlib
import json
import sys
from types import ModuleType

import pytest
import torch

from mmvssm_kernels.testing import OPERATORS, BidirectionalGla, Conv1d, Scan, Scan2d

from ..helpers import ROOT

MODULES = ("cases", "floors", "peers", "timing", "run")


@pytest.fixture
def benchmark(monkeypatch):
    """The scripts of kernels/benchmarks by name; they import each other as top-level modules."""
    monkeypatch.syspath_prepend(str(ROOT / "kernels" / "benchmarks"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (Scan2d(128, 96, 56, 56, 6, 1), 0.111, 0.149),
        (Scan2d(128, 768, 14, 14, 24, 16), 0.332, 0.557),
        (Scan2d(2, 96, 200, 304, 6, 1), 0.034, 0.045),
        (BidirectionalGla(128, 196, 3, 32, 64), 0.009, 0.016),
        (BidirectionalGla(128, 3136, 3, 16, 32), 0.072, 0.126),
    ],
)
def test_floors_are_those_of_the_specification(benchmark, case, forward, backward):
    """Computed by hand from one pass over memory at 4.27 TB/s, 4.18e12 exponentials, 32.1e12 multiply-adds a second."""
    assert benchmark["floors"].floors(case, 2) == pytest.approx((forward, backward), abs=6e-4)


def test_every_case_has_a_floor_and_an_operator(benchmark):
    cases = benchmark["cases"]
    everything = [*cases.CASES.values(), *(case for lengths in cases.SERIES.values() for case in lengths.values())]
    for case in everything:
        assert type(case) in OPERATORS
        assert all(0 < least < 10 for least in benchmark["floors"].floors(case, 2))


def test_a_run_on_a_cpu(benchmark, monkeypatch, tmp_path, capsys):
    run = benchmark["run"]
    monkeypatch.setattr(run, "CASES", {"scan": Scan(2, 4, 9, 2), "conv": Conv1d(1, 3, 8)})
    monkeypatch.setattr(run, "SERIES", {"scan over length": {n: Scan(8 // n, 3, n, 2) for n in (4, 8)}})
    files = ["--json", str(tmp_path / "times.json"), "--plot", str(tmp_path / "times.png")]
    assert run.main(["--device", "cpu", "--dtype", "float32", *files]) == 0
    report = json.loads((tmp_path / "times.json").read_text())
    assert set(report["results"]) == {"scan", "conv"}
    assert set(report["series"]["scan over length"]) == {"4", "8"}
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in report["results"].values())
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    assert "float32" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(benchmark, monkeypatch, capsys):
    run = benchmark["run"]
    monkeypatch.setattr(run, "CASES", {"wrong": Scan(1, 3, 5, 2), "right": Conv1d(1, 3, 8)})

    def wrong(*inputs, backend="auto", **options):
        y, state = right(*inputs, backend=backend, **options)
        return (y, state) if backend == "reference" else (1.01 * y, state)

    right = run.OPERATORS[Scan]
    monkeypatch.setitem(run.OPERATORS, Scan, wrong)
    assert run.main(["--device", "cpu", "--dtype", "float32"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("wrong")] == ["wrong" + " " * 24 + "not timed: its check failed"]
    assert next(line for line in lines if line.startswith("right")).split()[1:]


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_peers_must_agree(benchmark, monkeypatch, factor):
    """A package that computes something else is named, not timed."""
    module = ModuleType("fla.ops.gla")

    def chunk_gla(q, k, v, g):
        decays = torch.exp(g.cumsum(1)[:, :, None] - g.cumsum(1)[:, None])  # (B, L, L, heads, K)
        weights = torch.einsum("blhk,blmhk,bmhk->bhlm", q, decays, k).tril() / q.shape[-1] ** 0.5
        return factor * torch.einsum("bhlm,bmhv->blhv", weights, v), None

    module.chunk_gla = chunk_gla
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.gla", module)
    case = BidirectionalGla(1, 6, 2, 4, 8)
    row = benchmark["run"].time_peer(case, case.inputs(torch.float32), "cpu")
    assert row["peer"] == "fla"
    assert ("peer_problem" in row) == (factor != 1.0)
    assert ("peer_forward_ms" in row) == (factor == 1.0)


@pytest.mark.parametrize(
    ("options", "sentence"), [(["--only", "nothing"], "matches no case"), ([], "torch sees no GPU")]
)
def test_mistakes(benchmark, monkeypatch, capsys, options, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark["run"].main(options) == 2
    assert sentence in capsys.readouterr().err
