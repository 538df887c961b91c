"""The authors' state dicts under our names."""

from typing import Any

from mmvssm.checkpoints.families import Family, StateDict, detect_family, get_family, known_families
from mmvssm.checkpoints.wrappers import unwrap

BACKBONE = "backbone."
# Parts that a family's table may produce beside the backbone.
_OTHER_PARTS = ("head.", "neck.")


def convert_official(state_dict: Any, family: str | None = None, prefer_ema: bool | None = None) -> StateDict:
    """Convert tensors in any published layout to the names of this project.

    Args:
        state_dict: A state dict, or anything `unwrap` opens. Accepted are the authors' layouts of a family, with or
            without `backbone.` (detection and segmentation files), and our own names, which come back unchanged.
        family: One of `known_families()`; None recognises it by the names.
        prefer_ema: Take averaged weights where there are both (True), or the raw ones (False). Default: those of the
            authors' published numbers, which are averaged for all families but MambaVision and Vim.

    Returns:
        `backbone.*`, `head.*` (a classifier) and `neck.*` (a pyramid of the family). Heads of detectors and segmentors
        keep their names. Names under which the family knows nothing are kept as `backbone.<name>`, so that a strict
        load reports them.

    Raises:
        ValueError: The tensors are of no known family, or of another than `family`; the sentence says of which.
    """
    tensors = unwrap(state_dict, True if prefer_ema is None else prefer_ema)
    asked = get_family(family) if family is not None else None
    for prefix in _candidate_prefixes(tensors):
        inner = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        found = _family_of(set(inner), asked)
        if found is not None:
            if prefer_ema is None and found.prefer_ema is not True:
                return convert_official(unwrap(state_dict, found.prefer_ema), found.name, prefer_ema=False)
            outside = {found.convert_outside(k) or k: v for k, v in tensors.items() if not k.startswith(prefix)}
            return {**_convert_backbone(found, inner), **outside}
    raise ValueError(_no_family_sentence(tensors, asked))


def holds_official_names(tensors: StateDict) -> bool:
    """Whether the backbone in `tensors` (any prefix) has the names of the authors of some family, not ours."""
    for prefix in _candidate_prefixes(tensors):
        family = detect_family({k[len(prefix) :] for k in tensors if k.startswith(prefix)})
        if family is not None:
            return not family.is_ours({k[len(prefix) :] for k in tensors if k.startswith(prefix)})
    return False


def describe_backbone(state_dict: StateDict, family: Family) -> tuple[str | None, str]:
    """Arch name (or None) and description of the backbone in `state_dict` (our names, `backbone.*` or bare)."""
    prefix = BACKBONE if any(k.startswith(BACKBONE) for k in state_dict) else ""
    inner = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    try:
        return family.describe(inner)
    except (KeyError, IndexError, ValueError):
        return None, f"part of a {family.title}"


def _candidate_prefixes(tensors: StateDict) -> list[str]:
    """Where the backbone may sit: every family has a stem of this name, and the shortest prefix comes first."""
    stems = {k.partition("patch_embed.")[0] for k in tensors if "patch_embed." in k}
    return sorted({"", BACKBONE, *(s for s in stems if s == "" or s.endswith("."))}, key=len)


def _family_of(names: set[str], asked: Family | None) -> Family | None:
    if asked is None:
        return detect_family(names)
    return asked if asked.is_official(names) or asked.is_ours(names) else None


def _convert_backbone(family: Family, tensors: StateDict) -> StateDict:
    if family.is_ours(set(tensors)):
        return {k if k.startswith(_OTHER_PARTS) else BACKBONE + k: v for k, v in tensors.items()}
    converted, unknown = family.convert(tensors)
    result = {k if k.startswith(_OTHER_PARTS) else BACKBONE + k: v for k, v in converted.items()}
    result.update((BACKBONE + k, tensors[k]) for k in unknown)
    return result


def _no_family_sentence(tensors: StateDict, asked: Family | None) -> str:
    if asked is not None:
        try:
            converted = convert_official(tensors)
        except ValueError:
            pass
        else:
            other = detect_family({k.removeprefix(BACKBONE) for k in converted})
            what = describe_backbone(converted, other)[1] if other else "another family"
            return f"These tensors are of {what}; family={asked.name!r} was asked for (use family={other.name!r})."
    names = ", ".join(list(tensors)[:5])
    wanted = f"the family {asked.name!r}" if asked else f"any known family ({', '.join(known_families())})"
    return f"These tensors do not follow the names of {wanted}; they begin with {names or 'nothing'}."
