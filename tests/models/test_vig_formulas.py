"""ViG and ViG-H against the paper's equations written down on the authors' tensors, token by token, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmvssm.checkpoints import load_into
from mmvssm.models import ViG, ViGH
from tests.checkpoints.test_vig_files import PLAIN, PYRAMID, official_file

VALUES, KEYS = 4, 2  # per head


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(x, sd, name):
    return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"], 1e-5)


def conv(x, sd, name, stride, padding):
    """Convolution of (B, H, W, C)."""
    y = F.conv2d(x.permute(0, 3, 1, 2), sd[f"{name}.weight"], sd[f"{name}.bias"], stride, padding)
    return y.permute(0, 2, 3, 1)


def swiglu(x, w1, w2):
    a, b = (x @ w1.T).chunk(2, dim=-1)
    return (F.silu(a) * b) @ w2.T


def attention(q, k, v, gf, gb, merge):
    """Sums over pairs of tokens, for one head: (L, K), (L, K), (L, V) and two log-decays (L, K)."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        for j in range(len(q)):
            if j <= i:
                out[i] += (q[i] * k[j] * gf[j + 1 : i + 1].sum(0).exp()).sum() * v[j]
            if j >= i:
                out[i] += (q[i] * k[j] * gb[i:j].sum(0).exp()).sum() * v[j]
    return merge * KEYS**-0.5 * out


def mixer(u, sd, place, merge, silu):
    B, H, W, C = u.shape
    x = F.conv2d(u.permute(0, 3, 1, 2), sd[f"{place}.in_proj.0.weight"], padding=1, groups=C).permute(0, 2, 3, 1)
    x = (F.silu(x) if silu else x).reshape(B, H * W, C)
    q, k, v = (x @ sd[f"{place}.qkv_proj.weight"].T).split([C // 2, C // 2, C], dim=-1)
    code = x @ sd[f"{place}.gk_proj.0.weight"].T
    z = code @ sd[f"{place}.gk_proj.1.weight"].T + sd[f"{place}.gk_proj.1.bias"]
    gf, gb = (F.logsigmoid(z) / 16).split(C // 2, dim=-1)
    g = torch.sigmoid(x @ sd[f"{place}.g_proj.weight"].T + sd[f"{place}.g_proj.bias"])
    y = torch.zeros_like(x)
    for b in range(B):
        for head in range(C // VALUES):
            keys, values = slice(head * KEYS, (head + 1) * KEYS), slice(head * VALUES, (head + 1) * VALUES)
            o = attention(*(t[b][:, keys] for t in (q, k)), v[b][:, values], gf[b][:, keys], gb[b][:, keys], merge)
            long, short = rms(o, sd[f"{place}.g_norm.weight"]), rms(x[b][:, values], sd[f"{place}.l_norm.weight"])
            y[b][:, values] = g[b][:, values] * long + (1 - g[b][:, values]) * short
    y = F.silu(y) if silu else y
    return (y @ sd[f"{place}.o_proj.weight"].T).view(B, H, W, C)


def plain(sd, image, merge, silu):
    """Residual streams after both blocks and the final norm."""
    x = layer_norm(conv(image.permute(0, 2, 3, 1), sd, "patch_embed.proj.0", 8, 1), sd, "patch_embed.proj.1")
    x = layer_norm(conv(F.silu(x), sd, "patch_embed.proj.3", 2, 1), sd, "patch_embed.proj.4")
    pos = sd["pos_embed"].view(1, 14, 14, 8).permute(0, 3, 1, 2)
    x = x + F.interpolate(pos, x.shape[1:3], mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    streams = []
    for i in range(2):
        place = f"blocks.{i}"
        x = x + mixer(rms(x, sd[f"{place}.attn_norm.weight"]), sd, f"{place}.attn", merge, silu)
        y = rms(x, sd[f"{place}.mlp_norm.weight"])
        x = x + swiglu(y, sd[f"{place}.mlp.gate_proj.weight"], sd[f"{place}.mlp.down_proj.weight"])
        streams.append(x)
    return streams[0], rms(x, sd["norm.weight"])


def pyramid(sd, image, merge, silu):
    """Output of every stage before its downsampling, normalised."""
    x = layer_norm(conv(image.permute(0, 2, 3, 1), sd, "patch_embed.0", 2, 1), sd, "patch_embed.2")
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    x = layer_norm(conv(x, sd, "patch_embed.5", 2, 1), sd, "patch_embed.7")
    outs = []
    for stage, depth in enumerate(PYRAMID["depths"]):
        for j in range(depth):
            place = f"layers.{stage}.blocks.{j}"
            x = x + mixer(layer_norm(x, sd, f"{place}.norm"), sd, f"{place}.op", merge, silu)
            y = layer_norm(x, sd, f"{place}.norm2")
            x = x + swiglu(y, sd[f"{place}.mlp.fc1.weight"], sd[f"{place}.mlp.fc2.weight"])
        outs.append(layer_norm(x, sd, f"outnorm{stage}"))
        if stage < 3:
            x = conv(x, sd, f"layers.{stage}.downsample.1", 2, 1)
            x = layer_norm(x, sd, f"layers.{stage}.downsample.3")
    return outs


def small_values(sd: dict) -> dict:
    """Weights near one for norms, small ones elsewhere, so that every term counts; exact in float64."""
    return {k: (1 + 0.1 * v if v.ndim == 1 and k.endswith("weight") else 0.3 * v).double() for k, v in sd.items()}


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 43), (7, 57)])
@pytest.mark.parametrize(("training", "merge"), [(False, 0.25), (True, 0.5)])
@pytest.mark.parametrize("silu", [False, True])
def test_plain(size, training, merge, silu):
    """tiny has the two activations, small and base do not."""
    act = "silu" if silu else None
    sd = small_values(official_file("plain"))
    net = ViG({**PLAIN, "conv_act": act, "out_act": act}, out_indices=(0, 1), drop_path_rate=0.0).double()
    load_into(net, sd)
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for got, want in zip(net.train(training)(image), plain(sd, image, merge, silu), strict=True):
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("size", [(21, 30), (1, 17)])
@pytest.mark.parametrize("training", [False, True])
def test_pyramid(size, training):
    sd = small_values(official_file("pyramid", dense=True))
    net = ViGH(PYRAMID, drop_path_rate=0.0).double()
    load_into(net, sd)
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for got, want in zip(net.train(training)(image), pyramid(sd, image, 0.5, False), strict=True):
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2), rtol=1e-9, atol=1e-9)
