"""Small state dicts in the authors' layouts, written down independently of the converter."""

import torch

DIALECTS = ("current", "legacy", "single-file")
GENERATIONS = {
    # arch of our backbone that the tensors fit
    "v0": dict(
        embed_dims=8,
        depths=(1, 1, 2, 1),
        ssm_ratio=2.0,
        d_state=3,
        gated=True,
        conv_bias=True,
        mlp_ratio=0.0,
        stem="patch",
        downsample="merge",
    ),
    "v2": dict(embed_dims=8, depths=(1, 1, 2, 1), ssm_ratio=2.0, d_state=1, stem="conv", downsample="conv3"),
}
CLASSES = 5


def vmamba_file(generation: str, dialect: str, dense: bool = False, conv_linear: bool = False, seed: int = 0) -> dict:
    """State dict of a tiny VMamba; the same seed gives the same network in every dialect.

    Args:
        generation: 'v0' or 'v2'.
        dialect: One of `DIALECTS`; the legacy layout exists for v0 only.
        dense: With output norms and without classifier.
        conv_linear: Linear weights as 1x1 convolutions.
        seed: Of the values.
    """
    old, single = dialect == "legacy", dialect == "single-file"
    states, gated = (3, True) if generation == "v0" else (1, False)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name, *shape, linear=False):
        value = torch.randn(shape, generator=generator)
        tensors[name] = value[..., None, None] if linear and conv_linear else value

    def add_norm(name, width):
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    def add_stacked(name, rows, columns, bare):
        """Four directions: (4, rows, columns), which the single-file code keeps as (4 * rows, columns)."""
        value = torch.randn(4, rows, columns, generator=generator)
        tensors[f"{name}.weight" if single else bare] = value.flatten(0, 1) if single else value

    if generation == "v0":
        add("patch_embed.proj.weight" if old else "patch_embed.0.weight", 8, 3, 4, 4)
        add("patch_embed.proj.bias" if old else "patch_embed.0.bias", 8)
        add_norm("patch_embed.norm" if old else "patch_embed.2", 8)
    else:
        add("patch_embed.0.weight", 4, 3, 3, 3)
        add("patch_embed.0.bias", 4)
        add_norm("patch_embed.2", 4)
        add("patch_embed.5.weight", 8, 4, 3, 3)
        add("patch_embed.5.bias", 8)
        add_norm("patch_embed.7", 8)

    for stage, depth in enumerate((1, 1, 2, 1)):
        width = 8 * 2**stage
        inner, rank = 2 * width, -(-width // 16)
        for block in range(depth):
            place = f"layers.{stage}.blocks.{block}"
            op = f"{place}.self_attention" if old else f"{place}.op"
            add_norm(f"{place}.ln_1" if old else f"{place}.norm", width)
            add_stacked(f"{op}.x_proj", rank + 2 * states, inner, f"{op}.x_proj_weight")
            add(f"{op}.A_logs", 4 * inner, states)
            add(f"{op}.Ds", 4 * inner)
            add_stacked(f"{op}.dt_projs", inner, rank, f"{op}.dt_projs_weight")
            add(f"{op}.dt_projs_bias", 4, inner)
            add(f"{op}.in_proj.weight", 2 * inner if gated else inner, width, linear=True)
            add(f"{op}.conv2d.weight", inner, 1, 3, 3)
            if generation == "v0":
                add(f"{op}.conv2d.bias", inner)
            add_norm(f"{op}.out_norm", inner)
            add(f"{op}.out_proj.weight", width, inner, linear=True)
            if generation == "v2":
                add_norm(f"{place}.norm2", width)
                add(f"{place}.mlp.fc1.weight", 4 * width, width, linear=True)
                add(f"{place}.mlp.fc1.bias", 4 * width)
                add(f"{place}.mlp.fc2.weight", width, 4 * width, linear=True)
                add(f"{place}.mlp.fc2.bias", width)
        if stage < 3:
            down = f"layers.{stage}.downsample"
            if generation == "v0":
                add(f"{down}.2.weight" if single else f"{down}.reduction.weight", 2 * width, 4 * width, linear=True)
                add_norm(f"{down}.1" if single else f"{down}.norm", 4 * width)
            else:
                add(f"{down}.1.weight", 2 * width, width, 3, 3)
                add(f"{down}.1.bias", 2 * width)
                add_norm(f"{down}.3", 2 * width)
    if dense:
        for stage in range(4):
            add_norm(f"outnorm{stage}", 8 * 2**stage)
    else:
        head = "" if old else "classifier."
        add_norm(f"{head}norm", 64)
        add(f"{head}head.weight", CLASSES, 64, linear=True)
        add(f"{head}head.bias", CLASSES)
    return tensors
