"""The metafiles: complete, generated where they can be, and the same as the tables of the model cards."""

import re

import pytest
import torch
import yaml

from mmvssm.utils.model_index import published_models
from tests.configs.conftest import FAMILIES, parsed
from tests.helpers import ROOT

INDEX = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
METAFILES = {file.split("/")[1]: yaml.safe_load((ROOT / file).read_text()) for file in INDEX}
ENTRIES = {entry["Name"]: entry for content in METAFILES.values() for entry in content["Models"]}
INPUT_SIZES = {"mmdet": "800 x 1280", "mmseg": "512 x 2048"}  # of the published tables, like those of Swin


def cost(entry: dict):
    """Parameters and operations of an entry's model, which is built on the meta device and never runs."""
    from mmvssm.analysis import model_cost
    from tests.configs.test_configs import build

    with torch.device("meta"):
        model = build(parsed(ROOT / entry["Config"]), "meta")
        return model_cost(model, tuple(map(int, entry["Metadata"]["Input Size"].split(" x "))))


def models() -> dict[str, list[dict]]:
    """Entries that have one model: schedules of a detector, and several files for a config."""
    groups = {}
    for entry in ENTRIES.values():
        stem = entry["Config"].rsplit("/", 1)[1].removesuffix(".py")
        groups.setdefault(stem.partition("_fpn_")[0], []).append(entry)
    return groups


def test_the_index_has_every_family():
    assert sorted(METAFILES) == [name for name in FAMILIES if name != "demo"]


@pytest.mark.parametrize("entries", models().values(), ids=models())
def test_parameters_and_flops_are_what_our_tool_counts(entries):
    """And, of classifiers, what the specifications of the families derived from the authors' code."""
    found = cost(entries[0])
    first = parsed(ROOT / entries[0]["Config"])
    for entry in entries:
        assert parsed(ROOT / entry["Config"]).model == first.model
        assert entry["Metadata"]["Parameters"] == found.parameters
        assert entry["Metadata"]["FLOPs"] == round(found.flops.total, -6)
    short = entries[0]["Name"].partition("_")[0]
    if first.default_scope == "mmpretrain":
        check_derived_figures(short, first.model.backbone.arch, found)


@pytest.mark.parametrize("name", ENTRIES)
def test_entry(name):
    """Fields that libraries, our loading or readers go by."""
    entry = ENTRIES[name]
    cfg = parsed(ROOT / entry["Config"])
    stem = entry["Config"].rsplit("/", 1)[1].removesuffix(".py")
    others = [e for e in ENTRIES.values() if e["Config"] == entry["Config"]]
    assert name == stem or (len(others) > 1 and name.startswith(f"{stem}-"))
    assert entry["In Collection"] == METAFILES[entry["Config"].split("/")[1]]["Collections"][0]["Name"]

    size = entry["Metadata"]["Input Size"]
    if cfg.default_scope == "mmpretrain":
        assert size == "{0} x {0}".format(*re.findall(r"in1k-(\d+)", name) or [224])
    else:
        assert size == ("640 x 2560" if "640x640" in name else INPUT_SIZES[cfg.default_scope])

    tasks = {"mmpretrain": {"Image Classification"}, "mmseg": {"Semantic Segmentation"}}
    tasks["mmdet"] = {"Object Detection", "Instance Segmentation"}
    assert {r["Task"] for r in entry.get("Results", [])} in (tasks[cfg.default_scope], set())
    assert "Results" in entry or "Weights" in entry

    if "Weights" in entry:
        assert entry["Weights"] == entry["Converted From"]["Weights"]
        file = entry["Weights File"]
        assert entry["Weights"].endswith("/" + file["Name"])
        assert file["License"]
        assert set(file) <= {"Name", "SHA256", "Size", "License"}
        assert re.fullmatch("[0-9a-f]{64}", file.get("SHA256", "0" * 64))
    for doubt in entry.get("Suspect", []):
        assert set(doubt) == {"Figures", "Reason"}
        metrics = {key for result in entry.get("Results", []) for key in result["Metrics"]}
        published = {f"Published {key}" for key in entry.get("Published", {})}
        assert set(doubt["Figures"]) <= metrics | published | {"Weights", "License"}


def test_every_file_is_named_once():
    urls = [entry["Weights"] for entry in ENTRIES.values() if "Weights" in entry]
    names = [entry["Weights File"]["Name"] for entry in ENTRIES.values() if "Weights" in entry]
    assert len(set(urls)) == len(urls) == len(set(names))
    checksums = [e["Weights File"]["SHA256"] for e in ENTRIES.values() if "SHA256" in e.get("Weights File", {})]
    assert len(set(checksums)) == len(checksums) == 6  # those of ViG and ViG-H, which are known


def test_every_published_result_and_file_has_an_entry():
    """VMamba: 11 files of 10 classifiers, 13 of detectors, 9 results or files of segmentors; MambaVision: 18 files."""
    assert {family: len(content["Models"]) for family, content in METAFILES.items()} == {
        "vmamba": 11 + 13 + 9,
        "vig": 6,
        "vim": 5,
        "mambavision": 11 + 3 + 4,
    }


def test_accuracies_in_file_names():
    """The authors of Vim and ViG put them there."""
    for name, entry in ENTRIES.items():
        in_name = re.search(r"_(\d\d)p(\d)acc", entry.get("Weights", ""))
        assert (in_name is not None) == name.startswith(("vim-", "vig-", "vigh-"))
        if in_name:
            assert entry["Results"][0]["Metrics"]["Top 1 Accuracy"] == float(f"{in_name[1]}.{in_name[2]}")


def test_the_index_reads_the_same():
    for name, info in published_models().items():
        entry = ENTRIES[name]
        assert (info.parameters, info.flops) == (entry["Metadata"]["Parameters"], entry["Metadata"]["FLOPs"])
        assert info.weights == entry.get("Weights")
        assert info.sha256 == entry.get("Weights File", {}).get("SHA256")
        assert info.license == entry.get("Weights File", {}).get("License")
        assert len(info.results) == sum(len(result["Metrics"]) for result in entry.get("Results", []))
        assert info.config.is_file()
    assert list(published_models()) == list(ENTRIES)


# ---------------------------------------------------------------------- published sizes

# Figures that the specifications of the families derived from the authors' code, in G: (of linear and convolutional
# layers, of the scans, of both and softmax attention), None where they give none, at the precision they give.
DERIVED = {
    "vim-tiny": (7_148_008, "1.29", "0.53", None),
    "vim-tiny-plus": (7_250_344, "4.79", "1.96", None),
    "vim-small": (25_796_584, "4.85", "1.06", None),
    "vim-small-plus": (26_001_256, "17.98", "3.93", None),
    "vim-base": (97_598_440, "18.77", "2.12", None),
    "vig-tiny": (5_834_536, None, "0.058", "1.17"),
    "vig-small": (22_615_144, None, "0.116", "4.48"),
    "vig-base": (89_022_184, None, "0.231", "17.55"),
    "vigh-tiny": (28_600_680, None, "0.087", "4.49"),
    "vigh-small": (50_051_688, None, "0.145", "8.75"),
    "vigh-base": (88_904_360, None, "0.193", "15.56"),
    "mambavision-t": (31_794_248, "4.46", None, "4.57"),
    "mambavision-t2": (35_104_008, "5.11", None, "5.24"),
    "mambavision-s": (50_140_584, "7.48", None, "7.58"),
    "mambavision-b": (97_685_288, "14.95", None, "15.18"),
    "mambavision-l": (227_961_048, "34.84", None, "35.18"),
    "mambavision-l2": (241_554_824, "37.50", None, "37.90"),
    "mambavision-b-21k": (97_685_288, "14.95", None, "15.18"),
    "mambavision-l-21k": (227_961_048, "34.84", None, "35.18"),
    "mambavision-l2-512-21k": (241_554_824, "195.9", None, "206.3"),
    "mambavision-l3-256-21k": (739_570_472, "122.1", None, "123.6"),
    "mambavision-l3-512-21k": (739_570_472, "488.4", None, "511.5"),
}
# VMamba's convention is ours, so the totals are the same. (0220: the specification's own count.)
DERIVED_TOTALS = {
    "vmamba-v0-tiny": (22_893_448, "5.627"),
    "vmamba-v0-small": (44_417_416, "11.232"),
    "vmamba-v0-base": (76_254_056, "18.020"),
    "vmamba-tiny-s2l5": (30_705_832, "4.858"),
    "vmamba-tiny-s1l8": (30_249_064, "4.906"),
    "vmamba-small-s2l15": (50_147_752, "8.716"),
    "vmamba-small-s1l20": (49_012_840, "8.612"),
    "vmamba-base-s2l15": (88_557_800, "15.359"),
    "vmamba-base-s1l20": (86_614_504, "15.221"),
    "vmamba-tiny-0220": (32_484_904, "5.050"),
}


def last_digit(number: str) -> float:
    """The value of a unit in the last place."""
    return 10.0 ** -len(number.partition(".")[2])


def multiply_adds(family: str, arch: str, found) -> tuple[float, float, float]:
    """Operations, in G, of linear and convolutional layers, of scans, of softmax attention; norms are left out."""
    counts = {operator.rpartition(".")[2]: number for operator, number in found.flops.by_operator.items()}
    layers = sum(counts.get(name, 0) for name in ("mm", "addmm", "convolution", "causal_conv1d"))
    scan, attention = counts.get("selective_scan", 0), counts.get("bmm", 0)
    if family == "vim":  # one operator for scans, convolutions and projections
        from mmvssm.models import Vim

        arch = Vim.resolve_arch(arch)
        grid = (224 - 16) // (arch["stride"] or 16) + 1
        inner = arch["depth"] * 2 * (grid**2 + 1) * 2 * arch["embed_dims"]
        layers += counts["bidirectional_selective_scan"] - inner * (9 * 16 + 1)
        scan = inner * (9 * 16 + 2)  # what the derived figures amount to; we count one operation less for each element
    elif family in ("vig", "vigh"):  # with its norm, as large as that of the gate
        scan = counts["bidirectional_gla"] - counts["locality_gate"]
    return layers / 1e9, scan / 1e9, attention / 1e9


def check_derived_figures(short: str, arch: str, found) -> None:
    if short in DERIVED_TOTALS:
        parameters, total = DERIVED_TOTALS[short]
        assert f"{found.flops.total / 1e9:.3f}" == total
    else:
        parameters, layers, scan, everything = DERIVED[short]
        counted = multiply_adds(short.partition("-")[0], arch, found)
        for value, expected in ((counted[0], layers), (counted[1], scan)):
            if expected is not None and short.startswith("mambavision"):  # not said: do depthwise convolutions count?
                assert value == pytest.approx(float(expected), abs=last_digit(expected))
            elif expected is not None:
                assert f"{value:.{len(expected.partition('.')[2])}f}" == expected
        if everything is not None:  # not said for MambaVision: how scans count, which are 0.1 to 0.3 % of the whole
            assert sum(counted) == pytest.approx(float(everything), rel=3e-3)
    assert found.parameters == parameters


def test_the_derived_figures_are_of_all_variants():
    from mmvssm.models import MambaVision, ViG, ViGH, Vim, VMamba

    families = {"vim": Vim, "vig": ViG, "vigh": ViGH, "mambavision": MambaVision, "vmamba": VMamba}
    variants = {f"{family}-{arch}" for family, backbone in families.items() for arch in backbone.arch_zoo}
    assert variants == {*DERIVED, *DERIVED_TOTALS}


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "Published" in entry])
def test_what_differs_from_the_published_size_is_called_doubtful(name):
    """Within their last digit and, for FLOPs, 4 % for what their counters leave out (attention, scans, resizing)."""
    entry = ENTRIES[name]
    doubtful = {figure for doubt in entry.get("Suspect", []) for figure in doubt["Figures"]}
    for key, unit in (("Parameters", 1e6), ("FLOPs", 1e9)):
        if key not in entry["Published"]:
            continue
        number, suffix = entry["Published"][key].split(" ")
        assert suffix == ("M" if key == "Parameters" else "G")
        allowed = last_digit(number) + (0.04 * float(number) if key == "FLOPs" else 0)
        if name.startswith("mambavision-l2-512") or name.startswith("mambavision-l3-512"):
            allowed = 0.06 * float(number)  # attention in windows of 1024 tokens
        differs = abs(entry["Metadata"][key] / unit - float(number)) > allowed
        assert differs == (f"Published {key}" in doubtful)


# ---------------------------------------------------------------------- model cards

# Column of a card -> what stands in it, in the order of its numbers.
COLUMNS = {
    "Params (M)": ("Parameters",),
    "FLOPs (G)": ("FLOPs",),
    "FLOPs (G), 800 x 1280": ("FLOPs",),
    "Top-1 (%)": ("Top 1 Accuracy",),
    "Top-5 (%)": ("Top 5 Accuracy",),
    "Top-1 / 5 (%)": ("Top 1 Accuracy", "Top 5 Accuracy"),
    "Box AP / 50 / 75": ("box AP", "box AP@0.5", "box AP@0.75"),
    "Mask AP / 50 / 75": ("mask AP", "mask AP@0.5", "mask AP@0.75"),
    "mIoU": ("mIoU",),
    "mIoU, multi-scale + flip": ("mIoU(ms+flip)",),
    "Published params, FLOPs": ("Published Parameters", "Published FLOPs"),
}
UNSHOWN = ("box AP (small)", "box AP (medium)", "box AP (large)")


def tables(text: str) -> list[dict[str, str]]:
    """The rows of all tables of a page, column -> cell."""
    rows, header = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = [cell.strip() for cell in line.strip("|").split("|")]
        elif not set(line) <= set("|-: "):
            rows.append(dict(zip(header, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return rows


def figures(entry: dict) -> dict[str, float]:
    found = {key: value for result in entry.get("Results", []) for key, value in result["Metrics"].items()}
    found |= {f"Published {key}": float(value.split(" ")[0]) for key, value in entry.get("Published", {}).items()}
    return found | {"Parameters": entry["Metadata"]["Parameters"] / 1e6, "FLOPs": entry["Metadata"]["FLOPs"] / 1e9}


def row_of(entry: dict, rows: list[dict[str, str]]) -> dict[str, str]:
    """The row with the entry's config and file."""
    config, weights = f"(./{entry['Config'].rsplit('/', 1)[1]})", entry.get("Weights")
    found = [
        row
        for row in rows
        if config in row.get("Config", "")
        and (f"({weights})" in row["Authors' file"] if weights else row["Authors' file"] == "-")
    ]
    assert len(found) == 1, f"{entry['Name']}: {len(found)} rows with its config and file"
    return found[0]


@pytest.mark.parametrize("family", METAFILES)
def test_the_card_shows_what_the_metafile_says(family):
    """Every entry has a row, and the numbers of both are the same, at the precision of the card."""
    rows = tables((ROOT / "configs" / family / "README.md").read_text())
    rows = [row for row in rows if "Authors' file" in row]
    entries = METAFILES[family]["Models"]
    assert len(rows) == len(entries)
    for entry in entries:
        row, values, shown = row_of(entry, rows), figures(entry), set()
        for column, keys in COLUMNS.items():
            if column not in row:
                continue
            numbers = re.findall(r"\d+\.?\d*", row[column].replace("800 x 1280", ""))
            expected = [values[key] for key in keys if key in values]
            if row[column] == "-":
                assert not expected, f"{entry['Name']}: {column}"
                continue
            if len(keys) == 1 and "table" in row[column]:  # one scale, and the doubtful number of the table
                keys, expected = (*keys, "mIoU(ms+flip)"), [*expected, values["mIoU(ms+flip)"]]
            assert len(numbers) == len(expected), f"{entry['Name']}: {column}"
            for number, value in zip(numbers, expected, strict=True):
                rounding = 0.5 * last_digit(number) + 5e-4  # of the card, and of FLOPs in the metafile, to millions
                assert float(number) == pytest.approx(value, abs=rounding), f"{entry['Name']}: {column}"
            shown |= set(keys)
        hidden = {key for key in values if key not in shown and not key.startswith("Published") and key not in UNSHOWN}
        assert not hidden, f"{entry['Name']}: the card lacks {hidden}"


@pytest.mark.parametrize("family", METAFILES)
def test_the_card_names_the_licence_of_the_weights(family):
    text = (ROOT / "configs" / family / "README.md").read_text()
    licenses = {e["Weights File"]["License"] for e in METAFILES[family]["Models"] if "Weights File" in e}
    for word in ("CC-BY-NC-SA-4.0", "Apache-2.0", "not known" if "unknown" in str(licenses) else ""):
        assert (word in text) or word not in str(licenses)
    assert "licen" in text.lower()
