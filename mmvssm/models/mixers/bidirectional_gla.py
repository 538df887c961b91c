"""Bidirectional gated linear attention, the token mixer of ViG (https://arxiv.org/abs/2405.18425)."""

import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm_kernels import bidirectional_gla

from ..layers import Conv2d, Linear, LocalityGate, build_activation, conv_channel_last

TRAIN_MERGE = 0.5  # the mean of the two directions
XAVIER_GAIN = 2**-2.5


class BidirectionalGLA(BaseModule):
    """Linear attention with data-dependent decay along the rows and back, gated against local features; channel-last.

    With heads of V value and K = V / 2 key channels, and tokens in row-major order:

        x = act(depthwise_conv3x3(input))
        q, k, v, g, c = in_proj(x)                      # C / 2, C / 2, C, C and gate_rank channels
        gf, gb = log_sigmoid(decay_proj(c)) / 16        # log-decays of both directions, C / 2 each
        F_t = exp(gf_t) F_{t-1} + k_t v_t'              # K x V states of a head, from the first token on
        R_t = exp(gb_t) R_{t+1} + k_t v_t'              # and from the last one on
        o_t = merge * K^-0.5 * q_t' (F_t + R_t)
        y = out_act(s * RMSNorm(o) + (1 - s) * RMSNorm(x)), s = sigmoid(g + bias)
        output = out_proj(y)

    Decays, states and o are float32 up to and including the norm of o, whatever autocast says: at initialisation o is
    of the order of 1e-9 to 1e-6, too small for float16.

    Args:
        embed_dims: Width C, a multiple of ``head_dims``.
        head_dims: Value channels per head V, even.
        gate_rank: Width of the low-rank code from which the decays are made.
        gate_normalizer: Divisor of the log-decays.
        conv_act: Activation after the depthwise convolution: 'silu', 'gelu', 'relu' or None.
        out_act: Activation before the output projection.
        eval_merge: Weight of the sum of the two directions in eval mode; in training it is 1/2.
        xavier_init: Whether the projections start Xavier-uniform with gain 2^-2.5; if False they keep what the
            model's ``init_cfg`` gives them. The convolution starts so in both cases.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(
        self,
        embed_dims: int,
        head_dims: int = 64,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        conv_act: str | None = None,
        out_act: str | None = None,
        eval_merge: float = TRAIN_MERGE,
        xavier_init: bool = True,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        if not isinstance(head_dims, int) or head_dims < 2 or head_dims % 2:
            raise ValueError(f"head_dims={head_dims!r} must be an even positive number: keys are half as wide")
        if embed_dims % head_dims:
            raise ValueError(f"embed_dims={embed_dims} must be a multiple of head_dims={head_dims}")
        C = embed_dims
        self.head_dims = head_dims
        self.gate_normalizer = gate_normalizer
        self.eval_merge = eval_merge
        self.xavier_init = xavier_init
        self.widths = (C // 2, C // 2, C, C, gate_rank)  # rows of in_proj: q, k, v, g, code of the decays

        self.conv = Conv2d(C, C, 3, padding=1, groups=C, bias=False)
        self.act = build_activation(conv_act, "conv_act")
        # One product for all that is read from the same tokens.
        self.in_proj = Linear(C, sum(self.widths), bias=False)
        self.decay_proj = Linear(gate_rank, C)
        self.g_norm = nn.RMSNorm(head_dims, eps=1e-6)
        self.gate = LocalityGate(C, head_dims, eps=1e-6, act=out_act)
        self.out_proj = Linear(C, C, bias=False)
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Draw what the published initialisation treats apart from other layers."""
        nn.init.xavier_uniform_(self.conv.weight, gain=XAVIER_GAIN)
        nn.init.zeros_(self.gate.bias)
        if self.xavier_init:
            q_k_v, g, code = self.in_proj.weight.split([sum(self.widths[:3]), *self.widths[3:]])
            for weight in (q_k_v, g, code, self.decay_proj.weight, self.out_proj.weight):
                nn.init.xavier_uniform_(weight, gain=XAVIER_GAIN)
            nn.init.zeros_(self.decay_proj.bias)

    def init_weights(self) -> None:
        """Initialise as mmengine says, then restore what a general rule must not touch."""
        first_call = not self.is_init  # a second call only warns, in mmengine and here
        super().init_weights()
        if first_call:
            self.init_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens.

        Args:
            x: (B, H, W, C).

        Returns:
            (B, H, W, C) in the dtype of out_proj's result.
        """
        # The projections are the largest tensors of a block: in a scope of their own they are gone before the product.
        return self.out_proj(self._attend(x))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        """What out_proj reads, (B, H, W, C)."""
        B, H, W, C = x.shape
        heads, K, V = C // self.head_dims, self.head_dims // 2, self.head_dims
        x = self.act(conv_channel_last(self.conv, x)).view(B * H * W, C)
        # Views of one tensor (B * H * W, 3C + gate_rank); the gradients of a split meet in one concatenation.
        q, k, v, g, code = self.in_proj(x).split(self.widths, dim=-1)
        gf, gb = self.decay_proj(code).chunk(2, dim=-1)  # logits of the decays
        merge = TRAIN_MERGE if self.training else self.eval_merge
        o = bidirectional_gla(
            q.view(B, H * W, heads, K),
            k.view(B, H * W, heads, K),
            v.view(B, H * W, heads, V),
            gf.view(B, H * W, heads, K),
            gb.view(B, H * W, heads, K),
            scale=merge * K**-0.5,
            gate_normalizer=self.gate_normalizer,
            norm_weight=self.g_norm.weight,
            norm_eps=self.g_norm.eps,
        )
        return self.gate(o, x.view(B, H * W, heads, V), g.view(B, H * W, heads, V)).view(B, H, W, C)
