"""A network of every family that takes no time."""

from mmvssm.models import MambaVision, ViG, ViGH, Vim, VMamba

MICRO = {
    "vmamba": lambda: VMamba(dict(embed_dims=8, depths=(1, 1)), out_indices=(1,)),
    "vim": lambda: Vim(dict(embed_dims=16, depth=2, d_state=4), img_size=64, out_indices=(1,)),
    "mambavision": lambda: MambaVision(
        dict(embed_dims=16, depths=(1, 1, 2, 2), num_heads=(2, 4)), window_size="map", out_indices=(3,)
    ),
    "vig": lambda: ViG(dict(embed_dims=8, depth=2, head_dims=4, mlp_multiple=4), img_size=64, out_indices=(1,)),
    "vigh": lambda: ViGH(dict(embed_dims=8, depths=(1, 1), head_dims=4, mlp_multiple=4), out_indices=(1,)),
}
