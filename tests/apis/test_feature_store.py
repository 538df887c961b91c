"""Feature export: interruption, two runs, folders with something else in them."""

import contextlib
import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

import mmvssm
from mmvssm.apis.feature_store import FeatureStore
from mmvssm.apis.features import read_features, read_manifest
from tests.helpers import ROOT

from .feature_inputs import QUICK, contents


@contextlib.contextmanager
def one_thread():
    """Rounding may depend on the number of threads; the started export has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# A process that imports once and forks an export for every line that it is given, slow enough to be hit.
EXPORTS = """
import os, sys, time
import torch
from mmvssm.apis import feature_network, feature_store, features
config = feature_network.read_config(sys.argv[1])
feature_network.build_network(config, "random", None, False, torch.device("cpu"))  # imports what takes time
write = feature_store.FeatureStore.write
def slow(self, *args):
    time.sleep(0.1)
    write(self, *args)
    print("wrote", flush=True)
feature_store.FeatureStore.write = slow
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        features.extract_features(*sys.argv[1:4], "random", batch_size=3, num_workers=1, device="cpu", progress=False)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@contextlib.contextmanager
def exports(config, photos, out):
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORTS, config, photos, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def start_export(process):
    """Id of the process of an export that has just written its first image."""
    process.stdin.write("\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    assert process.stdout.readline() == "wrote\n"
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system")
class TestInterruption:
    def test_killed_and_continued(self, config, photos, tmp_path):
        """Killed three times; meanwhile no other run is let in. Continued, it ends up byte-identical."""
        quick = {**QUICK, "num_workers": 1, "batch_size": 3}
        with one_thread():
            mmvssm.extract_features(config, photos, tmp_path / "whole", **quick)
        out = tmp_path / "killed"
        with exports(config, photos, out) as process:
            for kill in range(3):
                child = start_export(process)
                if kill == 0:
                    os.kill(child, signal.SIGSTOP)
                    with pytest.raises(ValueError, match=r"Another run is writing into .*killed; wait for it"):
                        mmvssm.extract_features(config, photos, out, **quick)
                os.kill(child, signal.SIGKILL)
                while process.stdout.readline() != "ended\n":
                    pass
        finished = len(list(read_manifest(out)))
        assert 3 <= finished < 7
        with one_thread():
            summary = mmvssm.extract_features(config, photos, out, **quick)
        assert (summary.reused, summary.written) == (finished, 7 - finished)
        assert contents(out) == contents(tmp_path / "whole")

    @pytest.mark.parametrize("step", range(12))
    def test_dying_at_any_step(self, config, photos, tmp_path, monkeypatch, step):
        """The process dies before its n-th rename or line of the manifest, or half way through that line."""
        quick = {**QUICK, "batch_size": 3, "format": "hdf5"}
        mmvssm.extract_features(config, photos, tmp_path / "whole", **quick)
        out = tmp_path / "cut"
        count = iter(range(10**6))

        class Died(BaseException):
            pass

        def die_now():
            if next(count) == step:
                raise Died

        class Manifest:
            def __init__(self, file):
                self.file = file

            def write(self, line):
                self.file.write(line[: len(line) // 2])
                self.file.flush()
                die_now()
                self.file.write(line[len(line) // 2 :])

            def __getattr__(self, name):
                return getattr(self.file, name)

        def open_and_wrap(self):
            opened(self)
            self._manifest = Manifest(self._manifest)

        def replace(source, target):
            die_now()
            renamed(source, target)

        opened, renamed = FeatureStore._open, os.replace
        with monkeypatch.context() as patch:
            patch.setattr(FeatureStore, "_open", open_and_wrap)
            patch.setattr("mmvssm.apis.feature_store.os.replace", replace)
            with pytest.raises(Died):
                mmvssm.extract_features(config, photos, out, **quick)
        if step > 1:
            for path in out.rglob("*.h5"):
                read_features(path)  # whole, whatever happened
        mmvssm.extract_features(config, photos, out, **quick)
        assert contents(out) == contents(tmp_path / "whole")

    def test_nothing_is_computed_again(self, config, photos, tmp_path, monkeypatch):
        from mmvssm.apis import features

        mmvssm.extract_features(config, photos, tmp_path / "out", **QUICK)
        before = contents(tmp_path / "out")
        monkeypatch.setattr(features, "forward_batch", None)
        summary = mmvssm.extract_features(config, photos, tmp_path / "out", **QUICK)
        assert (summary.written, summary.reused) == (0, 7)
        assert contents(tmp_path / "out") == before

    def test_removed_file_is_made_again(self, config, photos, tmp_path):
        mmvssm.extract_features(config, photos, tmp_path / "out", **QUICK)
        before = (tmp_path / "out" / "features" / "a.png.npz").read_bytes()
        (tmp_path / "out" / "features" / "a.png.npz").unlink()
        assert mmvssm.extract_features(config, photos, tmp_path / "out", **QUICK).written == 1
        assert (tmp_path / "out" / "features" / "a.png.npz").read_bytes() == before
        assert len(list(read_manifest(tmp_path / "out"))) == 7


class TestFolder:
    def test_two_runs_of_one_process(self, tmp_path):
        with FeatureStore(tmp_path / "out", {}, "npz"):
            with pytest.raises(ValueError, match="Another run is writing"):
                FeatureStore(tmp_path / "out", {}, "npz").__enter__()
            with FeatureStore(tmp_path / "other", {}, "npz"):
                pass
        with FeatureStore(tmp_path / "out", {}, "npz"):
            pass

    def test_file_system_without_locks(self, tmp_path, monkeypatch):
        fcntl = pytest.importorskip("fcntl", reason="needs a POSIX system")

        def lockf(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", lockf)
        with pytest.raises(OSError, match=r"out cannot be locked \(No locks available\)"):
            FeatureStore(tmp_path / "out", {}, "npz").__enter__()

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (dict(out_indices=(0, 3)), r"stages is \[1, 3\] there, \[0, 3\] now"),
            (dict(size=32), "preprocessing is"),
            (dict(batch_size=4), "batch_size is 8 there, 4 now"),
            (dict(dtype="fp16"), "dtype is 'float32' there, 'float16' now"),
        ],
    )
    def test_other_settings(self, config, photos, tmp_path, change, sentence):
        mmvssm.extract_features(config, photos / "a.png", tmp_path / "out", **QUICK)
        before = contents(tmp_path / "out")
        with pytest.raises(ValueError, match=rf"out holds features of other settings .*{sentence}.*another folder"):
            mmvssm.extract_features(config, photos / "a.png", tmp_path / "out", **{**QUICK, **change})
        assert contents(tmp_path / "out") == before

    def test_other_images_of_the_same_name(self, config, photos, tmp_path):
        mmvssm.extract_features(config, photos / "a.png", tmp_path / "out", **QUICK)
        with pytest.raises(ValueError, match=r"holds features of .* under the name a\.png"):
            mmvssm.extract_features(config, photos / "more" / "a.png", tmp_path / "out", **QUICK)

    def test_folder_of_something_else(self, config, photos, tmp_path):
        (tmp_path / "thesis.txt").touch()
        with pytest.raises(ValueError, match=r"holds other files \(thesis\.txt"):
            mmvssm.extract_features(config, photos, tmp_path, **QUICK)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
        with pytest.raises(ValueError, match="is a file; give a folder"):
            mmvssm.extract_features(config, photos, tmp_path / "thesis.txt", **QUICK)
