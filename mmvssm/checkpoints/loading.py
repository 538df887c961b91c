"""Loading a checkpoint of any published layout into a backbone or a whole model, with a coverage report."""

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import nn

from mmvssm.checkpoints.convert import BACKBONE, convert_official, describe_backbone, holds_official_names
from mmvssm.checkpoints.families import Family, StateDict, get_family
from mmvssm.checkpoints.reader import read_checkpoint
from mmvssm.checkpoints.wrappers import unwrap


@dataclass
class LoadReport:
    """What became of the tensors of a checkpoint; names are those of the module.

    Attributes:
        source: The file, or 'state dict'.
        content: Family and variant of the backbone in it, if it is one of ours.
        matched: Tensors that were loaded.
        resized: Those of them that were brought to another size.
        missing: Tensors of the module that the file lacks.
        unexpected: Tensors of the file that have no place.
        mismatched: Name -> (shape in the file, shape in the module).
        left_out: Tensors of the file left out by rule (a classifier or other heads for a backbone, output norms).
        kept: Tensors of the module that keep their values by rule (output norms).
        notes: Sentences about what was left out.
    """

    source: str
    content: str = "weights"
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """One line of counts, then the notes."""
        counts = (
            f"{len(self.matched)} tensors matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.mismatched)} of another shape, {len(self.resized)} resized, {len(self.left_out)} left out"
        )
        return " ".join([f"Loaded {self.content} from {self.source}: {counts}.", *self.notes])


def load_into(
    module: nn.Module,
    source: str | os.PathLike | dict,
    prefix: str | None = None,
    strict: bool = True,
    prefer_ema: bool | None = None,
) -> LoadReport:
    """Load a checkpoint, ours or the authors' in any layout and wrapper, into a backbone or a whole model.

    For a backbone everything outside it (classifier, necks, heads) is left out. The norms after the output stages are
    loaded only if the file has all that the model has; else they stay as they are (identity in a new model), which is
    how the authors start dense prediction from a classification file. Everything else has to match.

    Args:
        module: One of our backbones, or a model with one of them as `backbone`; wrapped models are opened. Models with
            a foreign backbone are loaded by name, without conversion.
        source: Path, URL, or what was loaded from one.
        prefix: Part of the file to take, such as 'backbone.'. Ignored where no name of the file begins with it, since
            the authors' classification files have no such prefix. Default: None, found by itself.
        strict: Raise if anything is missing, left over or of another shape. False logs it instead, and only raises if
            nothing at all matches.
        prefer_ema: Take averaged weights where the file has both (True), or the raw ones (False). Default: those of the
            authors' published numbers, which are averaged for all families but MambaVision and Vim.

    Returns:
        The report, which is also logged.

    Raises:
        ValueError: The file does not fit; the sentence names the variant it holds. Also as `read_checkpoint`.
        FileNotFoundError: There is no such file.
    """
    from_file = isinstance(source, (str, os.PathLike))
    report = LoadReport(os.fspath(source) if from_file else "state dict")
    target = module.module if is_model_wrapper(module) else module
    own = target.state_dict()
    is_backbone = isinstance(getattr(target, "family", None), str)
    backbone = target if is_backbone else getattr(target, "backbone", None)
    family = get_family(backbone.family) if isinstance(getattr(backbone, "family", None), str) else None
    if prefer_ema is None:
        prefer_ema = family.prefer_ema if family is not None else True

    tensors = unwrap(read_checkpoint(source) if from_file else source, prefer_ema)
    if prefix and any(k.startswith(prefix) for k in tensors):
        report.left_out += [k for k in tensors if not k.startswith(prefix)]
        tensors = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    if family is not None:
        tensors = _convert(tensors, family, report)
        if is_backbone:
            tensors = _take_backbone(tensors, report)
        tensors = _adapt(tensors, backbone, "" if is_backbone else BACKBONE, report)
        tensors = _apply_output_norm_rule(tensors, own, family, "" if is_backbone else BACKBONE, report)

    fitting = _match(tensors, own, family, "" if is_backbone else BACKBONE, report)
    if (strict and not report.fits) or not fitting:
        raise ValueError(_misfit_sentence(report, target, tensors, own, family))
    target.load_state_dict(fitting, strict=False)
    print_log(report.summary(), logger="current", level=logging.INFO if report.fits else logging.WARNING)
    return report


def under_our_names(module: nn.Module, state_dict: Any) -> Any:
    """A state dict as MMEngine's loading, which goes by names, can use it for a model with one of our backbones.

    Args:
        module: The model that is to be loaded.
        state_dict: What MMEngine found: a state dict, or a wrapper that it does not know.

    Returns:
        `state_dict` itself if the model has no backbone of ours or the names are not those of the authors. Else one
        under our names, with the backbone of `module`, which has been loaded by `load_into`, and the heads of the file.

    Raises:
        ValueError: The file is of the authors, but its backbone does not fit.
    """
    target = module.module if is_model_wrapper(module) else module
    is_backbone = isinstance(getattr(target, "family", None), str)
    backbone = target if is_backbone else getattr(target, "backbone", None)
    if not isinstance(getattr(backbone, "family", None), str) or not isinstance(state_dict, dict):
        return state_dict
    try:
        tensors = unwrap(state_dict, get_family(backbone.family).prefer_ema)
    except ValueError:  # MMEngine says what it misses
        return state_dict
    if not holds_official_names(tensors):
        return state_dict
    load_into(backbone, tensors)
    if is_backbone:
        return backbone.state_dict()
    heads = {k: v for k, v in convert_official(tensors, backbone.family).items() if not k.startswith(BACKBONE)}
    return {**backbone.state_dict(prefix=BACKBONE), **heads}


def _convert(tensors: StateDict, family: Family, report: LoadReport) -> StateDict:
    try:
        converted = convert_official(tensors, family=family.name)
    except ValueError as error:
        raise ValueError(f"{report.source} does not fit a {family.title}: {error}") from error
    report.content = describe_backbone(converted, family)[1]
    return converted


def _take_backbone(tensors: StateDict, report: LoadReport) -> StateDict:
    outside = [k for k in tensors if not k.startswith(BACKBONE)]
    if outside:
        report.left_out += outside
    parts = sorted({k.partition(".")[0] for k in report.left_out})
    if parts:
        report.notes.append(f"Not part of the backbone, left out: {', '.join(parts)}.")
    return {k[len(BACKBONE) :]: v for k, v in tensors.items() if k.startswith(BACKBONE)}


def _adapt(tensors: StateDict, backbone: nn.Module, prefix: str, report: LoadReport) -> StateDict:
    """Let the backbone bring what depends on its size, or on the task, to what it is built for."""
    inner = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    adapted = backbone.adapt_state_dict(inner)
    report.resized += [prefix + k for k, v in adapted.items() if v.shape != inner[k].shape]
    dropped = sorted(set(inner) - set(adapted))
    report.left_out += [prefix + k for k in dropped]
    if dropped:
        report.notes.append(f"Without a place in this backbone, left out: {', '.join(dropped)}.")
    outside = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    return {**{prefix + k: v for k, v in adapted.items()}, **outside}


def _apply_output_norm_rule(
    tensors: StateDict, own: StateDict, family: Family, prefix: str, report: LoadReport
) -> StateDict:
    def is_norm(name: str) -> bool:
        return name.startswith(prefix) and family.is_output_norm(name[len(prefix) :])

    wanted = {k for k in own if is_norm(k)}
    offered = {k for k in tensors if is_norm(k)}
    dropped = offered - wanted if wanted <= offered else offered
    if not wanted <= offered:
        report.notes.append(
            f"The file has not all output norms of the model ({len(wanted & offered)} of {len(wanted)} tensors), so "
            "none is loaded and they keep their initial values."
        )
        report.kept = sorted(wanted)
    report.left_out += sorted(dropped)
    return {k: v for k, v in tensors.items() if k not in dropped}


def _match(tensors: StateDict, own: StateDict, family: Family | None, prefix: str, report: LoadReport) -> StateDict:
    """Sort every name into the report and return what can be loaded."""
    fitting = {}
    for name, tensor in tensors.items():
        if name not in own:
            report.unexpected.append(name)
            continue
        if tensor.shape != own[name].shape and family is not None and name.startswith(prefix):
            resized = family.resize(name[len(prefix) :], tensor, own[name].shape)
            if resized is not None:
                tensor = resized
                report.resized.append(name)
        if tensor.shape != own[name].shape:
            report.mismatched[name] = (tuple(tensor.shape), tuple(own[name].shape))
        else:
            fitting[name] = tensor
            report.matched.append(name)
    accounted = set(tensors) | set(report.kept)
    # Counters of batch norm are absent from old files and only matter without momentum.
    report.missing = [k for k in own if k not in accounted and not k.endswith("num_batches_tracked")]
    return fitting


def _misfit_sentence(
    report: LoadReport, module: nn.Module, tensors: StateDict, own: StateDict, family: Family | None
) -> str:
    """Says what the file holds, what the model is, and the first names that differ."""
    parts = [f"{report.source} does not fit this {type(module).__name__}"]
    if family is not None:
        (arch, content), model = describe_backbone(tensors, family), describe_backbone(own, family)[1]
        if content != model:
            parts[0] += f": it holds {content}, the model is {model}"
            if arch is not None:
                return f"{parts[0]}. Build the model with {family.how_to_build(arch, tensors)} to load this file."
    details = []
    if report.missing:
        details.append(f"missing in the file: {len(report.missing)} ({_some(report.missing)})")
    if report.unexpected:
        details.append(f"without a place in the model: {len(report.unexpected)} ({_some(report.unexpected)})")
    if report.mismatched:
        shapes = [f"{k}: {a} in the file, {b} in the model" for k, (a, b) in report.mismatched.items()]
        details.append(f"of another shape: {len(report.mismatched)} ({_some(shapes)})")
    parts.append("Tensors " + "; ".join(details) if details else "It has no tensors in common with the model")
    troubled: list[Any] = [*report.missing, *report.unexpected, *report.mismatched]
    whole_model = any(k.startswith(BACKBONE) for k in own)
    if whole_model and not any(k.startswith(BACKBONE) for k in troubled):
        parts.append(
            "Its backbone fits: to start from the backbone alone give the backbone "
            "init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.'), or use get_backbone"
        )
    return ". ".join(parts) + "."


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
