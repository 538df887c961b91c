"""ONNX files of classifiers and multi-stage backbones."""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

DYNAMIC = ("none", "batch", "all")
TOLERANCE = 1e-4
# At this size every window, patch and position embedding of the families needs the general form of its code, also at
# sizes where a special case would do, such as a map of one window. Nothing is computed at it.
_TRACED_SIZE = (1061, 1487)


def export_onnx(
    model: str | nn.Module,
    path: str | os.PathLike,
    input_size: int | Sequence[int] = 224,
    dynamic: str = "batch",
    checkpoint: str | os.PathLike | None = None,
    out_indices: int | Sequence[int] | None = None,
    verify: bool = True,
) -> Path:
    """Write a classifier or a backbone as an ONNX file of standard operators (opset 18), float32.

    Inputs are ``images`` (B, C, H, W), normalised as for the model itself; outputs are ``logits`` (B, classes) of a
    classifier, or one feature per out index, ``stage{i}`` or for plain backbones ``block{i}``, as the backbone returns
    it. The sequential part of every scan is a node Scan, or three for long sequences.

    Args:
        model: A name as for :func:`mmvssm.get_model`, or a classifier of mmpretrain or a backbone of this package, on
            the CPU, with float32 weights.
        path: File to write, ending in .onnx.
        input_size: Height and width, or one number for both. With ``dynamic='all'`` only the check uses it.
        dynamic: 'none' (batch 1 and ``input_size`` only), 'batch' (any batch), or 'all' (any batch, height and width
            that the model takes).
        checkpoint: Weights for a name, as for :func:`mmvssm.get_model`; None leaves random weights.
        out_indices: For a name: export the backbone's maps of these stages instead of the classifier.
        verify: Whether to compare the file with the model in onnxruntime, at ``input_size`` and, where the batch is
            dynamic, at another batch; where the size is, at another size.

    Returns:
        ``path``.

    Raises:
        ValueError: If an argument is not as described.
        TypeError: If ``model`` is something else, a detector for example.
        ImportError: If onnx, onnxscript or, for the check, onnxruntime is not installed.
        RuntimeError: If the file and the model differ by more than 1e-4 of the largest value.

    Example:
        >>> from mmvssm.export import export_onnx
        >>> export_onnx("vmamba-tiny-s1l8", "tiny.onnx", out_indices=(0, 1, 2, 3), dynamic="all")  # doctest: +SKIP
    """
    path, size = Path(path), _size(input_size)
    if path.suffix != ".onnx":
        raise ValueError(f"path must end in .onnx, got {path}")
    if dynamic not in DYNAMIC:
        raise ValueError(f"dynamic={dynamic!r} must be one of {', '.join(map(repr, DYNAMIC))}")
    _require("onnx", "onnxscript", *(["onnxruntime"] if verify else []))
    if isinstance(model, str):
        model = _named(model, checkpoint, out_indices)
    elif checkpoint is not None or out_indices is not None:
        raise ValueError("checkpoint and out_indices are for names; this model is already built")
    tensors, names = _as_function(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _evaluating(model):
        _convert(tensors, names, _channels(model), size, dynamic).save(path)
    if verify:
        _verify(path, model, size, dynamic)
    return path


def onnx_errors(
    path: str | os.PathLike, model: nn.Module, input_size: int | Sequence[int], batch: int = 1
) -> dict[str, float]:
    """Largest difference of every output of a file from the model's, relative to the output's largest value.

    Args:
        path: An ONNX file made of ``model`` by :func:`export_onnx`.
        model: The model.
        input_size: Height and width of the random images to compare at, or one number for both.
        batch: Number of these images.

    Returns:
        Output name -> difference.

    Raises:
        ImportError: If onnxruntime is not installed.
        RuntimeError: If an output has another shape than the model's.
    """
    _require("onnxruntime")
    import onnxruntime

    tensors, _ = _as_function(model)
    images = torch.randn(batch, _channels(model), *_size(input_size), generator=torch.Generator().manual_seed(0))
    with _evaluating(model):
        expected = tensors(images)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    errors = {}
    for name, got, want in zip(names, session.run(None, {"images": images.numpy()}), expected, strict=True):
        if tuple(got.shape) != tuple(want.shape):
            raise RuntimeError(f"output {name} of {path} has shape {tuple(got.shape)}, the model's {tuple(want.shape)}")
        difference = (torch.from_numpy(got) - want).abs().max() / want.abs().max().clamp_min(1e-30)
        errors[name] = difference.item()
    return errors


# ---------------------------------------------------------------------- conversion


class _Function(nn.Module):
    """A model as torch.export takes it: images to a tuple of tensors."""

    def __init__(self, model: nn.Module, classifier: bool):
        super().__init__()
        self.model = model
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.classifier:
            return self.model(images)
        return (self.model(images, mode="tensor"),)


class _Decomposed(nn.Module):
    """A module whose operators of this project run, and are traced, as their decompositions.

    One pass of torch's exporter less than decomposing the exported program, of which each takes seconds.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from .decompositions import decomposition_table

        table = decomposition_table()

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                return table.get(function, function)(*args, **(kwargs or {}))

        with Mode():
            return self.module(images)


def _convert(tensors: nn.Module, names: list[str], channels: int, size: tuple[int, int], dynamic: str):
    """The ONNX program of torch's exporter."""
    from torch.export import Dim

    from .onnx_functions import TRANSLATIONS

    axes = {"none": (), "batch": (0,), "all": (0, 2, 3)}[dynamic]
    # A batch of 1 would be taken for a constant.
    images = torch.zeros(2 if 0 in axes else 1, channels, *(_TRACED_SIZE if 2 in axes else size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter deprecates parts of itself
        program = torch.export.export(
            _Decomposed(tensors), (images,), dynamic_shapes=(dict.fromkeys(axes, Dim.DYNAMIC),), strict=False
        )
        return torch.onnx.export(
            program,
            input_names=["images"],
            output_names=names,
            dynamo=True,
            opset_version=18,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )


def _verify(path: Path, model: nn.Module, size: tuple[int, int], dynamic: str) -> None:
    height, width = size
    cases = {"none": [(size, 1)], "batch": [(size, 1), (size, 3)], "all": [(size, 1), ((height + 9, width + 46), 2)]}
    for case_size, batch in cases[dynamic]:
        errors = onnx_errors(path, model, case_size, batch)
        # Not `error > TOLERANCE`, which a NaN would pass.
        if bad := {name: error for name, error in errors.items() if not error <= TOLERANCE}:
            listed = ", ".join(f"{name} {error:.1e}" for name, error in bad.items())
            raise RuntimeError(
                f"{path} differs from the model at {batch} x {case_size[0]} x {case_size[1]}: {listed} of the largest "
                f"value, more than {TOLERANCE:.0e}"
            )


# ---------------------------------------------------------------------- arguments


def _size(input_size: int | Sequence[int]) -> tuple[int, int]:
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(f"input_size={input_size!r} must be a positive integer or a pair of them, height and width")
    return size


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'The ONNX export needs {", ".join(missing)}; install what it takes with: pip install "mmvssm[onnx]".'
        )


def _named(name: str, checkpoint: str | os.PathLike | None, out_indices: int | Sequence[int] | None) -> nn.Module:
    from mmvssm.apis import get_backbone, get_model

    if out_indices is None:
        return get_model(name, checkpoint)
    indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
    return get_backbone(name, checkpoint, out_indices=indices)


def _as_function(model: nn.Module) -> tuple[_Function, list[str]]:
    """The model with tensors in and out, and the names of its outputs."""
    from mmvssm.models import BaseBackbone

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a name or a torch.nn.Module, got {type(model).__name__}")
    classifier = hasattr(model, "backbone") and hasattr(model, "extract_feat")
    heads = [name for name in ("bbox_head", "rpn_head", "roi_head", "decode_head") if hasattr(model, name)]
    backbone = model.backbone if classifier else model
    if heads or not isinstance(backbone, BaseBackbone):
        raise TypeError(
            "export_onnx takes classifiers and backbones of this package (a detector's or segmentor's: its attribute "
            f"backbone, or mmvssm.get_backbone), got {type(model).__name__}"
        )
    if getattr(backbone, "flip_ratio", 0):
        raise ValueError("a backbone with flip_ratio reverses sequences at random, which a file cannot; set it to 0")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ValueError(f"export takes float32 models on the CPU, but {name} is {tensor.dtype} on {tensor.device}")
    if classifier:
        return _Function(model, True), ["logits"]
    part = "stage" if hasattr(backbone, "stages") else "block"
    return _Function(model, False), [f"{part}{i}" for i in backbone.out_indices]


def _channels(model: nn.Module) -> int:
    return getattr(model, "backbone", model).in_channels


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, as both the file and its check take the model."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
