"""From whatever a file holds to its flat state dict."""

from collections.abc import Mapping
from typing import Any

import torch

from mmvssm.checkpoints.unpickle import StandIn

# Names under which published files keep averaged weights (preferred) and the weights themselves.
_AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "model_ema_state_dict")
_PLAIN = ("state_dict", "model", "model_state_dict", "module", "net", "network", "params", "weights", "student")
# Written around the whole model: DistributedDataParallel, torch.compile, Hugging Face and Lightning modules.
_OUTER_PREFIXES = ("module.", "_orig_mod.", "model.")


def unwrap(obj: Any, prefer_ema: bool | None = True) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, without wrappers and without prefixes of the whole model.

    Opened are any nesting of `model`, `state_dict`, `module`, ... and their averaged counterparts (`model_ema`,
    `state_dict_ema`, ...), then the prefixes `module.`, `_orig_mod.` and `model.` that all names share. Where a file
    holds raw *and* averaged weights the averaged ones are taken, since the published numbers are theirs. In files of
    MMEngine's EMAHook the two are exchanged (`state_dict` is the average, `ema_state_dict` the raw weights); this is
    taken into account.

    Args:
        obj: What was saved: a state dict or a dict around one.
        prefer_ema: Take averaged weights where there are any (True), the raw ones (False), or what stands under
            `state_dict` or `model`, averaged or not (None). Default: True.

    Returns:
        Names and tensors. Entries that are no tensors (counters, configurations) are left out.

    Raises:
        ValueError: There are no tensors, or the file holds a pickled module instead of its state dict.
    """
    found = _find(obj, prefer_ema, depth=0)
    if found is None:
        if isinstance(obj, StandIn):
            raise ValueError(f"The file holds a whole pickled {obj.path}; save its state_dict() instead.")
        inner = next((v for v in obj.values() if isinstance(v, StandIn) and v.state), None) if _is_dict(obj) else None
        if inner is not None and inner.path.rpartition(".")[2] not in ("CfgNode", "Namespace", "ConfigDict"):
            raise ValueError(f"The file holds a whole pickled {inner.path}; save its state_dict() instead.")
        keys = ", ".join(map(repr, list(obj)[:8])) if _is_dict(obj) else type(obj).__name__
        raise ValueError(
            f"No weights found: expected a state dict or a dict around one, got {keys or 'an empty dict'}."
        )
    return strip_outer_prefixes({k: v for k, v in found.items() if isinstance(v, torch.Tensor)})


def strip_outer_prefixes(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove `module.`, `_orig_mod.` and `model.` as long as all names begin with one of them."""
    # The averaged model of MMEngine and torch counts its updates in a tensor beside the weights.
    if "n_averaged" in state_dict or "steps" in state_dict:
        state_dict = {k: v for k, v in state_dict.items() if k not in ("n_averaged", "steps")}
    while state_dict:
        prefix = next((p for p in _OUTER_PREFIXES if all(k.startswith(p) for k in state_dict)), None)
        if prefix is None:
            break
        state_dict = {k[len(prefix) :]: v for k, v in state_dict.items()}
    return state_dict


def _is_dict(obj: Any) -> bool:
    return isinstance(obj, Mapping)


def _has_tensors(obj: Any) -> bool:
    """A state dict: string names, at least one of a tensor; more than one or a dotted name, to pass over counters."""
    names = [k for k, v in obj.items() if isinstance(k, str) and isinstance(v, torch.Tensor)]
    return len(names) > 1 or any("." in n for n in names)


def _find(obj: Any, prefer_ema: bool | None, depth: int) -> Mapping | None:
    if isinstance(obj, StandIn):  # a state dict in a foreign dict class
        obj = obj.items
    if not _is_dict(obj) or depth > 4:
        return None
    exchanged = "state_dict" in obj and "ema_state_dict" in obj and ("message_hub" in obj or "meta" in obj)
    averaged_first = False if prefer_ema is None else prefer_ema != exchanged
    order = (*_AVERAGED, *_PLAIN) if averaged_first else (*_PLAIN, *_AVERAGED)
    # A real state dict may have a part called `model` or `module`, but never as a key of its own.
    for key in order:
        inner = _find(obj[key], prefer_ema, depth + 1) if key in obj else None
        if inner is not None:
            return inner
    return obj if _has_tensors(obj) else None
