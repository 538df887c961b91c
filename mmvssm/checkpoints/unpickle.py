"""A pickle reader that never calls anything a file asks for.

Ordinary unpickling looks names up and calls them with arguments of the file. Here a name becomes a `GlobalName`, a
plain record that cannot be called. A short table (`_REBUILD`) says how tensors, numpy arrays and the containers of
the standard library are made; these are the only calls that ever happen, with checked arguments. Objects of foreign
classes (configuration nodes, parsed arguments, ...) become a `StandIn` that merely holds what the file says of them.
Everything else is refused.
"""

import _compat_pickle
import pickle
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch


class RefusedError(pickle.UnpicklingError):
    """The file asks for something that is not data."""


class GlobalName:
    """A class or function that a file mentions by name; it is neither imported nor callable."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"<name {self.path}, not imported>"


class StandIn:
    """What a file says about an object of a foreign class; the class itself is never imported.

    Attributes:
        path: dotted name of the class.
        args: arguments the object was to be made with.
        state: its attributes (usually a dict), or None.
        items: its entries, if it was a mapping.
        elements: its elements, if it was a sequence.
    """

    __slots__ = ("args", "elements", "items", "path", "state")

    def __init__(self, path: str, args: tuple = ()) -> None:
        self.path = path
        self.args = args
        self.state: Any = None
        self.items: dict = {}
        self.elements: list = []

    def __repr__(self) -> str:
        return f"<stand-in for an object of {self.path}>"


# --- what may be rebuilt, and how -------------------------------------------------------------------------------

_DTYPE_SPEC = re.compile(r"[<>=|]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU]\d+|O8?|\?)")
_STORAGES = (torch.storage.TypedStorage, torch.storage.UntypedStorage)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(f"malformed {what}")


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    _require(isinstance(storage, _STORAGES), "tensor")
    metadata = metadata if type(metadata) is dict and metadata else None
    return torch._utils._rebuild_tensor_v2(
        storage, offset, tuple(size), tuple(stride), bool(requires_grad), OrderedDict(), metadata
    )


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    _require(isinstance(storage, _STORAGES) and isinstance(dtype, torch.dtype), "tensor")
    return torch._utils._rebuild_tensor_v3(
        storage, offset, tuple(size), tuple(stride), bool(requires_grad), OrderedDict(), dtype
    )


def _parameter(data, requires_grad=True, hooks=None, state=None):
    # `state` (attributes that somebody hung on the parameter) is left out on purpose.
    _require(isinstance(data, torch.Tensor), "parameter")
    return torch.nn.Parameter(data, requires_grad=bool(requires_grad) and data.is_floating_point())


def _tensor_with_attributes(rebuild, cls, args, state):
    _require(isinstance(rebuild, GlobalName) and rebuild.path in _TENSORS, "tensor")
    return _TENSORS[rebuild.path](*args)


def _ndarray(cls, shape, typecode):
    _require(isinstance(cls, GlobalName) and cls.path == "numpy.ndarray", "numpy array")
    return np.ndarray((0,), "b")


def _ndarray_from_buffer(buffer, dtype, shape, order):
    _require(isinstance(dtype, np.dtype) and not dtype.hasobject and order in ("C", "F"), "numpy array")
    return np.frombuffer(bytearray(buffer), dtype=dtype).reshape(tuple(shape), order=order)


def _np_dtype(spec, align=False, copy=True):
    _require(type(spec) is str and _DTYPE_SPEC.fullmatch(spec) is not None, "numpy dtype")
    return np.dtype(spec, False, True)


def _np_scalar(dtype, raw=b""):
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    _require(isinstance(dtype, np.dtype) and not dtype.hasobject and isinstance(raw, bytes), "numpy scalar")
    return np.frombuffer(raw, dtype=dtype, count=1)[0]


def _encode(text, encoding="latin1"):
    _require(type(text) is str and encoding in ("latin1", "latin-1", "utf-8", "utf8", "ascii"), "byte string")
    return text.encode(encoding)


def _container(cls: type) -> Callable:
    def make(content=()):
        _require(type(content) in (tuple, list, dict, set, frozenset, str, bytes, OrderedDict), cls.__name__)
        return cls(content)

    return make


def _number(cls: type) -> Callable:
    def make(*args):
        _require(all(type(a) in (int, float, str, bool, type(None)) for a in args), cls.__name__)
        return cls(*args)

    return make


def _attribute(owner, name):
    # The one legitimate use in checkpoints: mmengine's HistoryBuffer lists its statistics as bound names.
    known = isinstance(owner, GlobalName) and owner.path in _HISTORY_BUFFERS and type(name) is str
    if not known:
        raise RefusedError(f"it looks up the attribute {name!r} of {owner!r}")
    return GlobalName(owner.module, f"{owner.name}.{name}")


def _reconstructor(cls, base, content):
    _require(isinstance(cls, GlobalName), "object")
    made = StandIn(cls.path)
    if isinstance(content, dict):
        made.items.update(content)
    elif isinstance(content, list):
        made.elements.extend(content)
    return made


_HISTORY_BUFFERS = ("mmengine.logging.history_buffer.HistoryBuffer", "mmengine.logging.HistoryBuffer")
_TENSORS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_REBUILD: dict[str, Callable] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.Size": lambda size=(): torch.Size(size),
    "torch.device": _number(torch.device),
    "numpy.ndarray": lambda *_: _require(False, "numpy array"),
    "numpy.dtype": _np_dtype,
    "collections.OrderedDict": _container(OrderedDict),
    "collections.Counter": _container(Counter),
    # Without its factory a defaultdict is a plain dict with another name; the factory would be a callable.
    "collections.defaultdict": lambda factory=None, content=(): defaultdict(None, content),
    "collections.deque": lambda content=(), maxlen=None: deque(content, maxlen),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "builtins.getattr": _attribute,
    **{f"builtins.{c.__name__}": _container(c) for c in (list, tuple, dict, set, frozenset, bytearray, bytes)},
    **{f"builtins.{c.__name__}": _number(c) for c in (int, float, complex, bool, str, slice, range)},
}
for _core in ("numpy.core", "numpy._core"):
    _REBUILD[f"{_core}.multiarray._reconstruct"] = _ndarray
    _REBUILD[f"{_core}.multiarray.scalar"] = _np_scalar
    _REBUILD[f"{_core}.numeric._frombuffer"] = _ndarray_from_buffer

# Names of the standard library that are data when only held, never called.
_HARMLESS_STDLIB = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w+|datetime\.\w+|builtins\.object"
    r"|typing\.[A-Z]\w+|uuid\.UUID|decimal\.Decimal"
)
_DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


class Unpickler(pickle._Unpickler):
    """Restricted unpickler, used by `torch.load(pickle_module=...)`; see the module docstring."""

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # written for Python 2: `commands.Popen` means subprocess.Popen
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        path = f"{module}.{name}"
        if path in _DTYPES:
            return _DTYPES[path]
        if path == "torch.storage.UntypedStorage":
            return torch.UntypedStorage
        if path in _REBUILD or _HARMLESS_STDLIB.fullmatch(path):
            return GlobalName(module, name)
        if module.partition(".")[0] in sys.stdlib_module_names:
            raise RefusedError(f"it asks for {path}")
        return GlobalName(module, name)

    def _make(self, target: Any, args: Any, kwargs: dict | None = None) -> Any:
        """The one place where objects are made: from the table, else a stand-in for a class, else refusal."""
        if not isinstance(target, GlobalName) or type(args) is not tuple:
            raise RefusedError(f"it calls {target!r}")
        if target.path in _REBUILD and not kwargs:
            return _REBUILD[target.path](*args)
        # Class names are capitalised by convention; what is not a class would be a function call.
        is_class = target.name.rpartition(".")[2][:1].isupper() or _HARMLESS_STDLIB.fullmatch(target.path)
        if not is_class or target.path == "builtins.object":
            raise RefusedError(f"it calls {target.path}")
        if target.path in _HISTORY_BUFFERS:
            return _history_buffer()
        return StandIn(target.path, args + ((kwargs,) if kwargs else ()))

    def _instantiate(self, klass: Any, args: list) -> None:  # opcodes INST and OBJ
        self.append(self._make(klass, tuple(args)))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._make(self.stack[-1], args)

    def load_newobj(self) -> None:
        args, target = self.stack.pop(), self.stack.pop()
        self.append(self._make(target, args))

    def load_newobj_ex(self) -> None:
        kwargs, args, target = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(self._make(target, args, kwargs))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is StandIn:
            target.state = state
        elif type(target) is OrderedDict:
            # The state dict of a module carries version numbers in this attribute; nothing else is taken over.
            if type(state) is dict and isinstance(state.get("_metadata"), dict):
                target._metadata = state["_metadata"]
        elif type(target) is np.ndarray:
            _require(type(state) is tuple and len(state) == 5 and isinstance(state[2], np.dtype), "numpy array")
            version, shape, dtype, fortran, raw = state
            raw = raw.encode("latin1") if isinstance(raw, str) else raw
            _require(type(raw) is (list if dtype.hasobject else bytes) and type(shape) is tuple, "numpy array")
            target.__setstate__((version, shape, dtype, fortran, raw))
        elif isinstance(target, np.dtype):
            plain = type(state) is tuple and len(state) >= 8 and state[2:5] == (None, None, None)
            _require(plain and state[1] in ("<", ">", "|", "="), "numpy dtype")
            self._replace(target, target.newbyteorder(state[1]))
        elif _is_history_buffer(target):
            _fill_history_buffer(target, state)
        elif isinstance(target, torch.Tensor):
            pass  # attributes somebody hung on a tensor
        else:
            raise RefusedError(f"it sets the state of {type(target).__name__} {target!r:.80}")

    def _replace(self, old: Any, new: Any) -> None:
        self.stack[-1] = new
        for key, value in self.memo.items():
            if value is old:
                self.memo[key] = new

    def _check_target(self, *kinds: type) -> Any:
        target = self.stack[-1]
        if type(target) not in kinds:
            raise RefusedError(f"it adds entries to {target!r:.80}")
        return target

    def load_append(self) -> None:
        value = self.stack.pop()
        target = self._check_target(list, deque, StandIn)
        (target.elements if type(target) is StandIn else target).append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        target = self._check_target(list, deque, StandIn)
        (target.elements if type(target) is StandIn else target).extend(values)

    def _set_items(self, values: list) -> None:
        target = self._check_target(dict, OrderedDict, defaultdict, Counter, StandIn)
        (target.items if type(target) is StandIn else target).update(zip(values[::2], values[1::2], strict=True))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_additems(self) -> None:
        values = self.pop_mark()
        self._check_target(set).update(values)

    def load_binpersid(self) -> None:
        pid = self.stack.pop()
        kind = pid[0] if type(pid) is tuple and pid else None
        if kind in ("storage", b"storage"):
            self.append(self.persistent_load(pid))
        elif kind in ("module", b"module") and len(pid) > 1:
            self.append(pid[1])  # legacy files that hold whole modules: the class, without its stored source
        else:
            raise RefusedError(f"it refers to an outside object {pid!r:.80}")

    def refuse_opcode(self) -> None:
        raise RefusedError("it uses a pickle instruction that checkpoints do not need")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.BINPERSID[0]] = load_binpersid
    for _op in (pickle.PERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        dispatch[_op[0]] = refuse_opcode


# --- mmengine's log history: the one foreign class that resuming a run needs as a working object ------------------


def _history_buffer():
    from mmengine.logging import HistoryBuffer

    return HistoryBuffer()


def _is_history_buffer(target: Any) -> bool:
    return f"{type(target).__module__}.{type(target).__qualname__}" in _HISTORY_BUFFERS


def _fill_history_buffer(buffer: Any, state: Any) -> None:
    """Copy the two arrays and the length; the table of statistics stays that of the installed class."""
    _require(type(state) is dict, "HistoryBuffer")
    for name in ("_log_history", "_count_history"):
        values = state.get(name)
        _require(isinstance(values, np.ndarray), "HistoryBuffer")
        setattr(buffer, name, values)
    _require(type(state.get("max_length", 0)) is int, "HistoryBuffer")
    buffer.max_length = state.get("max_length", buffer.max_length)


def load(file, **kwargs) -> Any:
    """Same signature as `pickle.load`; what `torch.load` calls on `pickle_module`."""
    return Unpickler(file, **kwargs).load()
