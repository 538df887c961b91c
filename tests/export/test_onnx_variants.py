"""The smallest published variant of each family, exported once for any batch and size, at two sizes."""

import pytest

import mmvssm
from mmvssm.export import export_onnx, onnx_errors

# Name -> stages; the plain backbones (vim, vig) give the map of their last block.
SMALLEST = {
    "vmamba-tiny-s1l8": (0, 1, 2, 3),
    "vim-tiny": None,
    "mambavision-t": (0, 1, 2, 3),
    "vig-tiny": None,
    "vigh-tiny": (0, 1, 2, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_parity_at_two_sizes(name, tmp_path):
    """Small ones: the numbers of tokens differ, and with them the parts of a scan, windows and position embeddings."""
    net = mmvssm.get_backbone(name, out_indices=SMALLEST[name])
    path = export_onnx(net, tmp_path / "net.onnx", dynamic="all", verify=False)
    for size, batch in (((64, 64), 1), ((96, 80), 2)):
        errors = onnx_errors(path, net, size, batch)
        assert len(errors) == len(net.out_indices)
        assert max(errors.values()) <= 1e-4, (size, errors)
