"""Opening files: every layout, foreign objects, bad files, and files that try to run code."""

import argparse
import builtins
import collections
import datetime
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from mmvssm.checkpoints import load_file, read_checkpoint
from mmvssm.checkpoints.unpickle import GlobalName, StandIn, Unpickler

LAYOUTS = ("zip", "legacy")


def save(obj, path, layout="zip", protocol=2):
    torch.save(obj, path, _use_new_zipfile_serialization=layout == "zip", pickle_protocol=protocol)
    return path


def save_raw_pickle(path, raw, layout):
    """A file of torch's `layout` whose main pickle is `raw`."""
    if layout == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", raw)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/version", "3\n")
    elif layout == "legacy":
        reference = io.BytesIO()
        torch.save({}, reference, _use_new_zipfile_serialization=False)
        reference.seek(0)
        for _ in range(3):  # magic number, protocol version, machine
            pickle.load(reference)
        head = reference.getvalue()[: reference.tell()]
        path.write_bytes(head + raw + pickle.dumps([], protocol=2))
    else:
        path.write_bytes(raw)
    return path


class TestLayouts:
    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_tensors_come_back_as_saved(self, tmp_path, layout, protocol):
        base = torch.randn(4, 6)
        saved = {
            "view": base.t()[1:],
            "half": torch.randn(3).half(),
            "bfloat16": torch.randn(3).bfloat16(),
            "integers": torch.arange(3),
            "flags": torch.tensor([True, False]),
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "parameter": torch.nn.Parameter(torch.randn(2)),
        }
        loaded = load_file(save(saved, tmp_path / "a.pth", layout, protocol))
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor), name

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_module_and_optimizer_state(self, tmp_path, layout):
        module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        optimizer = torch.optim.AdamW(module.parameters())
        module(torch.randn(2, 1, 5, 5)).sum().backward()
        optimizer.step()
        saved = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "rng": (1, "a", None)}
        loaded = load_file(save(saved, tmp_path / "a.pth.tar", layout))
        assert type(loaded["model"]) is collections.OrderedDict
        assert loaded["model"]._metadata == module.state_dict()._metadata
        other = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        other.load_state_dict(loaded["model"])
        torch.optim.AdamW(other.parameters()).load_state_dict(loaded["optimizer"])
        assert torch.equal(other[0].weight, module[0].weight)
        assert loaded["epoch"] == 3
        assert loaded["rng"] == (1, "a", None)

    def test_torchs_strict_switch_is_respected(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
        assert load_file(save({"a": torch.ones(1)}, tmp_path / "a.pth"))["a"] == 1
        with pytest.raises(ValueError, match="Weights only load failed"):
            load_file(save({"a": argparse.Namespace()}, tmp_path / "a.pth"))

    def test_tensors_of_an_absent_device(self, tmp_path):
        path = save({"a": torch.ones(1)}, tmp_path / "a.pth")

        def elsewhere(storage, location):
            raise RuntimeError("Attempting to deserialize object on a CUDA device but ...")

        with pytest.raises(ValueError, match="device that is not here; give map_location='cpu'"):
            load_file(path, map_location=elsewhere)

    def test_map_location(self, tmp_path):
        path = save({"a": torch.randn(2)}, tmp_path / "a.pt")
        assert load_file(path, map_location="meta")["a"].is_meta
        assert load_file(path, map_location=lambda storage, location: storage)["a"].device.type == "cpu"

    def test_safetensors(self, tmp_path):
        import safetensors.torch as safetensors

        path = tmp_path / "a.safetensors"
        safetensors.save_file({"a": torch.arange(3.0)}, path)
        assert torch.equal(load_file(path)["a"], torch.arange(3.0))
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(ValueError, match="truncated or damaged"):
            load_file(path)

    def test_safetensors_absent(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"x")
        with pytest.raises(ImportError, match="pip install safetensors"):
            load_file(path)


VANISHED_LIBRARY = """
class CfgNode(dict):
    'Like the configuration node of yacs: a dict subclass with attributes.'
    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__['__immutable__'] = True

def helper():
    pass
"""


def vanished_library():
    """A library that exists while a file is written and is gone where it is read."""
    module = types.ModuleType("vanished_library")
    exec(VANISHED_LIBRARY, vars(module))
    return module


class TestForeignObjects:
    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_become_inert_stand_ins(self, tmp_path, monkeypatch, layout, protocol):
        library = vanished_library()
        monkeypatch.setitem(sys.modules, "vanished_library", library)
        config = library.CfgNode({"MODEL": library.CfgNode({"DEPTHS": [2, 2]})})
        saved = {
            "model": {"w.weight": torch.ones(2), "w.bias": torch.zeros(2)},
            "config": config,
            "args": argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("out"), main=library.helper),
            "when": datetime.datetime(2024, 1, 2),
        }
        path = save(saved, tmp_path / "a.pth", layout, protocol)
        monkeypatch.delitem(sys.modules, "vanished_library")
        loaded = load_file(path)
        assert torch.equal(loaded["model"]["w.weight"], torch.ones(2))
        node = loaded["config"]
        assert type(node) is StandIn
        assert node.path == "vanished_library.CfgNode"
        assert node.items["MODEL"].items == {"DEPTHS": [2, 2]}
        assert loaded["args"].path == "argparse.Namespace"
        assert loaded["args"].state["lr"] == 0.1
        assert type(loaded["args"].state["main"]) is GlobalName
        assert not callable(loaded["args"].state["main"])
        assert "vanished_library" not in sys.modules

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_numpy_values(self, tmp_path, protocol):
        saved = {
            "float": np.float64(0.5),
            "integer": np.int32(-7),
            "array": np.arange(6, dtype=np.float32).reshape(2, 3),
            "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
            "big endian": np.arange(3, dtype=">i4"),
            "strings": np.array(["a", "bc"]),
            "objects": np.array([1, "x", None], dtype=object),
            "same": (shared := np.zeros(2), shared),
        }
        loaded = load_file(save(saved, tmp_path / "a.pth", protocol=protocol))
        for name in saved.keys() - {"same"}:
            expected = pickle.loads(pickle.dumps(saved[name], protocol))
            assert type(loaded[name]) is type(expected), name
            assert np.array_equal(loaded[name], saved[name]), name
            assert loaded[name].dtype == expected.dtype
        assert loaded["same"][0] is loaded["same"][1]

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_containers(self, tmp_path, protocol):
        counts = collections.defaultdict(list, {"a": [1]})
        saved = {
            "set": {1, 2},
            "frozenset": frozenset({3}),
            "bytes": b"\x00\xff",
            "bytearray": bytearray(b"ab"),
            "complex": 1 + 2j,
            "counter": collections.Counter("aab"),
            "deque": collections.deque([1, 2], maxlen=3),
            "default": counts,
            "size": torch.Size([1, 2]),
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "slice": slice(1, 2),
        }
        loaded = load_file(save(saved, tmp_path / "a.pth", protocol=protocol))
        assert loaded == saved
        assert loaded["default"].default_factory is None

    def test_a_whole_pickled_module_is_explained(self, tmp_path):
        from mmvssm.checkpoints import unwrap

        path = save({"model": torch.nn.Linear(1, 1)}, tmp_path / "a.pth")
        loaded = load_file(path)
        assert type(loaded["model"]) is StandIn
        with pytest.raises(ValueError, match=r"whole pickled .*Linear; save its state_dict"):
            unwrap(loaded)


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
            load_file(tmp_path / "absent.pth")

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder"):
            load_file(tmp_path)

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"", "is empty"),
            (b"\n <!DOCTYPE html><html>404</html>", "is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
            (b"\x89HDF\r\n", "is an HDF5 file"),
            (b"\x1f\x8b\x08", "is gzip-compressed"),
            (b"just some words", "truncated, damaged or no PyTorch checkpoint"),
            (b"\x80\x02", "truncated, damaged or no PyTorch checkpoint"),
            (pickle.dumps({"a": 1}), "truncated, damaged or no PyTorch checkpoint"),
        ],
    )
    def test_other_content(self, tmp_path, content, sentence):
        path = tmp_path / "a.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence) as caught:
            load_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("part", [0.02, 0.3, 0.9, 0.999])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_truncated(self, tmp_path, layout, part):
        path = save({"a.weight": torch.randn(300), "b": torch.randn(300)}, tmp_path / "a.pth", layout)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(ValueError, match="truncated"):
            load_file(path)

    def test_other_zip(self, tmp_path):
        path = tmp_path / "a.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "x")
        with pytest.raises(ValueError, match="not one written by torch"):
            load_file(path)

    def test_torchscript_is_not_run(self, tmp_path):
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("data.pkl", "constants.pkl"):
                archive.writestr(f"net/{name}", b"x")
        with pytest.raises(ValueError, match="TorchScript"):
            load_file(path)

    def test_tar_is_not_unpacked(self, tmp_path):
        import tarfile

        (tmp_path / "storages").write_bytes(b"x")
        with tarfile.open(tmp_path / "a.pth", "w") as archive:
            archive.add(tmp_path / "storages", "storages")
        with pytest.raises(ValueError, match="tar archive"):
            load_file(tmp_path / "a.pth")


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __call__(self):
        """Only so that pickle accepts one call as the function of another."""

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def calls(canary):
    """Objects that would create the file `canary` if anything of them ran, or prepare such a step."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    inner = pickle.dumps(Call(os.system, touch))
    from mmengine.config import Config
    from mmengine.logging import HistoryBuffer

    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "subprocess": Call(subprocess.Popen, touch.split()),
        "open": Call(open, str(canary), "w"),
        "import": Call(builtins.__import__, "os"),
        "getattr chain": Call(Call(getattr, Call(importlib.import_module, "os"), "system"), touch),
        "getattr of a value": Call(getattr, "text", "upper"),
        "getattr of the history buffer": Call(getattr, Call(getattr, HistoryBuffer, "__init__"), "__globals__"),
        "calling its attribute": Call(Call(getattr, HistoryBuffer, "mean"), None),
        "attrgetter": Call(operator.attrgetter, "system"),
        "partial": Call(functools.partial, os.system, touch),
        "map": Call(list, Call(map, os.system, [touch])),
        "nested pickle": Call(pickle.loads, inner),
        "nested torch": Call(torch.storage._load_from_bytes, inner),
        "torch.load": Call(torch.load, str(canary)),
        "torch.hub": Call(torch.hub.load, "a", "b"),
        "config": Call(Config.fromstring, code, ".py"),
        "type": Call(type, "A", (), {}),
        "code in a dict": {"a": [Call(os.system, touch)]},
        "code as a key": {Call(os.system, touch): 1},
        "code in a namespace": argparse.Namespace(x=Call(os.system, touch)),
        "code in the state": Call(collections.OrderedDict, state=Call(os.system, touch)),
        "defaultdict factory": Call(collections.defaultdict, Call(functools.partial, os.system, touch)),
        "instance called": Call(Call(argparse.Namespace)),
        "tensor with a false storage": Call(torch._utils._rebuild_tensor_v2, "x", 0, (1,), (1,), False, {}),
        "numpy without limits": Call(np.dtype, [("a", "O")]),
        "function of numpy": Call(np.load, str(canary)),
    }


def opcode_attacks(canary):
    """The same intentions in instructions that ordinary pickling does not write."""
    touch = f"touch {canary}".encode()
    return {
        "INST": b"(S'" + touch + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + touch + b"'\no.",
        "NEWOBJ": b"\x80\x02cos\nsystem\nU" + bytes([len(touch)]) + touch + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04cos\nsystem\nU" + bytes([len(touch)]) + touch + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93U" + bytes([len(touch)]) + touch + b"\x85R.",
        "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R.",
        "python 2 name": b"c__builtin__\neval\n(S'1'\ntR.",
        "python 2 os": b"cposix\nsystem\n(S'" + touch + b"'\ntR.",
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent text id": b"Pstorage\n.",
        "persistent id of another kind": b"\x80\x02U\x05otherK\x01\x86Q.",
        "state of a class": b"\x80\x02ccollections\nOrderedDict\n}U\x01aK\x01sb.",
        "state of a tensor type": b"\x80\x02ctorch.storage\nUntypedStorage\n}U\x01aK\x01sb.",
        "items into a class": b"\x80\x02ccollections\nOrderedDict\nU\x01aK\x01s.",
        "append to a name": b"\x80\x02csome_library\nThing\nK\x01a.",
        "calling a dtype": b"\x80\x02ctorch\nfloat32\n)R.",
        "calling a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "calling a number": b"\x80\x02K\x01)R.",
        "reconstructing": b"ccopyreg\n_reconstructor\n(S'x'\nc__builtin__\nobject\nNtR.",
        "function of a library": b"csome_library\nrun\n(tR.",
    }


CANARY_NAMES = list(calls("x")), list(opcode_attacks("x"))


class TestHostileFiles:
    @pytest.mark.parametrize("layout", [*LAYOUTS, "bare pickle"])
    @pytest.mark.parametrize("name", CANARY_NAMES[0])
    def test_calls_are_refused_and_never_run(self, tmp_path, name, layout):
        canary = tmp_path / "canary"
        raw = pickle.dumps({"model": {"a.b": 1}, "extra": calls(canary)[name]}, protocol=2)
        path = save_raw_pickle(tmp_path / "a.pth", raw, layout)
        with pytest.raises(
            ValueError, match=r"is refused because it holds more than data: .*Nothing of it was executed"
        ):
            load_file(path)
        assert not canary.exists()

    @pytest.mark.parametrize("layout", [*LAYOUTS, "bare pickle"])
    @pytest.mark.parametrize("name", CANARY_NAMES[1])
    def test_unusual_instructions_are_refused(self, tmp_path, name, layout):
        canary = tmp_path / "canary"
        path = save_raw_pickle(tmp_path / "a.pth", opcode_attacks(canary)[name], layout)
        # Outside torch's layouts a storage type is just a name; such a file fails as no checkpoint.
        harmless = name == "calling a storage" and layout == "bare pickle"
        with pytest.raises(ValueError, match="no PyTorch checkpoint" if harmless else "is refused because"):
            load_file(path)
        assert not canary.exists()

    def test_the_attacks_would_work_on_ordinary_unpickling(self, tmp_path):
        """The canary is a real one: the same bytes do run under pickle."""
        for number, (name, attack) in enumerate({"system": "os.system", "INST": "INST"}.items()):
            canary = tmp_path / f"canary{number}"
            raw = pickle.dumps(calls(canary)[attack]) if name == "system" else opcode_attacks(canary)[attack]
            pickle.loads(raw)
            assert canary.exists()

    def test_no_file_can_reach_a_callable(self):
        """Whatever name a file mentions, what it gets is a record, a dtype or a storage type."""
        unpickler = Unpickler(io.BytesIO())
        for module, name in [("torch._utils", "_rebuild_tensor_v2"), ("builtins", "getattr"), ("any.library", "call")]:
            assert not callable(unpickler.find_class(module, name))

    def test_messages_quote_no_control_characters(self, tmp_path):
        path = save_raw_pickle(tmp_path / "a.pth", b"\x80\x02cos\nsys\x1b[31mtem\n)R.", "zip")
        with pytest.raises(ValueError, match=r"it asks for os\.sys\?\[31mtem"):
            load_file(path)

    def test_trusting_other_libraries_does_not_widen_the_list(self, tmp_path):
        canary = tmp_path / "canary"
        path = save_raw_pickle(tmp_path / "a.pth", pickle.dumps(Call(os.system, f"touch {canary}"), protocol=2), "zip")
        with (
            torch.serialization.safe_globals([(os.system, "posix.system")]),
            pytest.raises(ValueError, match="refused"),
        ):
            load_file(path)
        assert not canary.exists()


class TestSources:
    def test_file_url_and_home(self, tmp_path, monkeypatch):
        path = save({"a": torch.ones(1)}, tmp_path / "a.pth")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert read_checkpoint(f"file://{path}")["a"] == 1
        assert read_checkpoint("~/a.pth")["a"] == 1
