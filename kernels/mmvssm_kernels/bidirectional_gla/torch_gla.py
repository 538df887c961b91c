"""Bidirectional gated linear attention in plain torch: matrix products over chunks, on any device and in float64.

A chunk of T tokens reads the state that enters it from the left (forward direction) and from the right (backward
direction); what happens inside is one matrix for both directions, the lower triangle of which decays with the forward
gates and the upper triangle with the backward gates. It is built level by level: at level h every block of 2 h tokens
is cut into halves, and a pair of tokens from both halves decays from the one to the middle and from the middle to the
other. Both factors are exponentials of sums of log-decays, so no exponent is ever positive, however strong the gates.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype

CHUNK = 32


def _split(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, heads, D) to chunks (n, B heads, T, D) in ``dtype``, zeros behind the last token."""
    batch, length, heads, width = tensor.shape
    chunks = -(-length // CHUNK)
    padded = F.pad(tensor.to(dtype), (0, 0, 0, 0, 0, chunks * CHUNK - length))
    return padded.view(batch, chunks, CHUNK, heads, width).permute(1, 0, 3, 2, 4).reshape(chunks, -1, CHUNK, width)


def _join(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of :func:`_split`: (B, L, heads, D), contiguous; ``shape`` is that of any input."""
    batch, length, heads, _ = shape
    chunks = tensor.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4)
    return chunks.reshape(batch, -1, heads, tensor.shape[-1])[:, :length].contiguous()


def _prefix(x: Tensor, exclusive: bool = False) -> Tensor:
    """Sums along axis -2 from its start up to each element, itself included unless ``exclusive``."""
    if exclusive:
        x = F.pad(x[..., :-1, :], (0, 0, 1, 0))
    return x.cumsum(-2)


def _suffix(x: Tensor, exclusive: bool = False) -> Tensor:
    """Sums along axis -2 from each element to its end."""
    return _prefix(x.flip(-2), exclusive).flip(-2)


class Decays(NamedTuple):
    """Products of decays inside the chunks, (n, rows, T, K) each; totals (n, rows, K, 1)."""

    left_query: Tensor  # from the left border to a token, its own decay included
    left_key: Tensor  # from a token, its own decay excluded, to the right border
    right_query: Tensor  # the same for the backward direction: from the right border to a token, included
    right_key: Tensor  # from a token, excluded, to the left border
    left_total: Tensor
    right_total: Tensor

    @classmethod
    def of(cls, gf: Tensor, gb: Tensor) -> "Decays":
        sums = (_prefix(gf), _suffix(gf, True), _suffix(gb), _prefix(gb, True))
        totals = (g.sum(-2).unsqueeze(-1) for g in (gf, gb))
        return cls(*(t.exp() for t in (*sums, *totals)))


def _levels(gf: Tensor, gb: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each level: decays of queries and keys (n, rows, T, K), its pairs (T, T), tokens of second halves (T, 1)."""
    token = torch.arange(CHUNK, device=gf.device)
    distance = token[:, None] ^ token
    half = 1
    while half < CHUNK:
        (f_first, f_second), (b_first, b_second) = (g.unflatten(-2, (-1, 2, half)).unbind(-3) for g in (gf, gb))
        query = torch.stack([_suffix(b_first), _prefix(f_second)], dim=-3).flatten(-4, -2)
        key = torch.stack([_suffix(f_first, True), _prefix(b_second, True)], dim=-3).flatten(-4, -2)
        second = (token // half % 2 == 1)[:, None]
        yield query.exp(), key.exp(), (distance >= half) & (distance < 2 * half), second
        half *= 2


def _states(decay: Tensor, increment: Tensor, reverse: bool) -> Tensor:
    """State that enters each chunk, from the other end if ``reverse``, in place of ``increment`` (n, rows, K, V)."""
    state = torch.zeros_like(increment[0])
    for n in range(len(increment) - 1, -1, -1) if reverse else range(len(increment)):
        following = torch.addcmul(increment[n], decay[n], state)
        increment[n] = state
        state = following
    return increment


def _weights(q: Tensor, k: Tensor, gf: Tensor, gb: Tensor) -> Tensor:
    """Matrix (n, rows, T, T) of a chunk for both directions; a token counts twice for itself."""
    matrix = torch.diag_embed(2 * (q * k).sum(-1))
    for query, key, pairs, _ in _levels(gf, gb):
        matrix += ((q * query) @ (k * key).mT) * pairs
    return matrix


def _inputs(q, k, v, gf, gb, gate_normalizer) -> list[Tensor]:
    dtype = computing_dtype(q)
    if gate_normalizer is not None:
        gf, gb = (F.logsigmoid(g.to(dtype)) / gate_normalizer for g in (gf, gb))
    return [_split(t, dtype) for t in (q, k, v, gf, gb)]


def bidirectional_gla_forward(
    q, k, v, gf, gb, norm_weight, scale, gate_normalizer, norm_eps, out_dtype, keep
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalised output before its weight and 1 / RMS (the last two empty unless ``keep`` and a norm)."""
    shape = v.shape
    q, k, v, gf, gb = _inputs(q, k, v, gf, gb, gate_normalizer)
    decay = Decays.of(gf, gb)
    left = _states(decay.left_total, (k * decay.left_key).mT @ v, reverse=False)
    right = _states(decay.right_total, (k * decay.right_key).mT @ v, reverse=True)
    out = _weights(q, k, gf, gb) @ v
    out += (q * decay.left_query) @ left
    out += (q * decay.right_query) @ right
    out = _join(out.mul_(scale), shape)
    if norm_weight is None:
        return out.to(out_dtype), out.new_empty(0), out.new_empty(0)
    rstd = (out.square().mean(-1) + norm_eps).rsqrt()
    normed = out * rstd[..., None]
    out = normed * norm_weight.to(normed.dtype)
    if not keep:
        normed, rstd = out.new_empty(0), out.new_empty(0)
    return out.to(out_dtype), normed, rstd


def norm_backward(dout: Tensor, normed: Tensor, rstd: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the output before the norm (B, L, heads, V) and of the weight (V)."""
    dtype = rstd.dtype
    dout, normed = dout.to(dtype), normed.to(dtype)
    dweight = (dout * normed).sum((0, 1, 2)).to(norm_weight.dtype)
    dnormed = dout * norm_weight.to(dtype)
    return rstd[..., None] * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)), dweight


def bidirectional_gla_backward(
    dout, q, k, v, gf, gb, norm_weight, normed, rstd, scale, gate_normalizer
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, gf, gb and the norm's weight (empty without one)."""
    inputs = (q, k, v, gf, gb)
    dweight = q.new_empty(0)
    if norm_weight is not None:
        dout, dweight = norm_backward(dout, normed, rstd, norm_weight)
    q, k, v, gf, gb = _inputs(*inputs, gate_normalizer)
    do = _split(dout, q.dtype) * scale
    decay = Decays.of(gf, gb)
    # States as in the forward pass, and gradients of the states, which travel the other way.
    left_key, right_key, left_query, right_query = (
        k * decay.left_key,
        k * decay.right_key,
        q * decay.left_query,
        q * decay.right_query,
    )
    left = _states(decay.left_total, left_key.mT @ v, reverse=False)
    right = _states(decay.right_total, right_key.mT @ v, reverse=True)
    dleft = _states(decay.left_total, left_query.mT @ do, reverse=True)
    dright = _states(decay.right_total, right_query.mT @ do, reverse=False)

    dv = _weights(q, k, gf, gb).mT @ do + left_key @ dleft + right_key @ dright
    # Parts of dq and dk that came through each direction, without a token's share in itself, whose decay is 1.
    dq_left, dq_right = decay.left_query * (do @ left.mT), decay.right_query * (do @ right.mT)
    dk_left, dk_right = decay.left_key * (v @ dleft.mT), decay.right_key * (v @ dright.mT)
    scores = do @ v.mT
    for query, key, pairs, second in _levels(gf, gb):
        level = scores * pairs
        dquery, dkey = query * (level @ (k * key)), key * (level.mT @ (q * query))
        dq_left += dquery * second
        dq_right += dquery * ~second
        dk_left += dkey * ~second
        dk_right += dkey * second
    diagonal = 2 * scores.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk = (dq_left + dq_right + diagonal * k, dk_left + dk_right + diagonal * q)
    # A gate's gradient: all pairs that it stands between. Those across the border come from the states at the border.
    across_left = (left * _leaving(decay.left_total, left_query.mT @ do, dleft)).sum(-1)
    across_right = (dright * _leaving(decay.right_total, right_key.mT @ v, right)).sum(-1)
    dgf = across_left[..., None, :] + _prefix(k * dk_left - q * dq_left, exclusive=True)
    dgb = across_right[..., None, :] + _prefix(q * dq_right - k * dk_right)
    grads = [_join(g, t.shape).to(t.dtype) for g, t in zip((dq, dk, dv), inputs, strict=False)]
    dgf, dgb = (_join(g, inputs[0].shape) for g in (dgf, dgb))
    dgb[:, -1] = 0  # no state enters the last token from the right; rounding would leave a trace
    for gradient, raw in zip((dgf, dgb), inputs[3:], strict=True):
        if gate_normalizer is not None:
            gradient *= torch.sigmoid(-raw.to(gradient.dtype)) / gate_normalizer
        grads.append(gradient.to(raw.dtype))
    return (*grads, dweight)


def _leaving(decay: Tensor, increment: Tensor, entering: Tensor) -> Tensor:
    """State that leaves each chunk."""
    return torch.addcmul(increment, decay, entering)
