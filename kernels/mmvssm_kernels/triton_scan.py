"""What the scan kernels share. Everything is float32, and exponentials are powers of two."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    """Logistic function; a squared reciprocal root costs fewer instructions than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def rounded(product):
    """The same product, rounded before it is added to others: for sums over lanes.

    Otherwise the compiler fuses a lane's product with the first addition, while its neighbour's arrives rounded: lanes
    that hold copies of the sum differ in the last bit, and write that. Here a zero is fused instead. That costs nothing
    where a lane has one product. Where it adds several of its own first, those are rounded by then, and this would cost
    an addition each.
    """
    return product + 0.0


@triton.jit
def softplus(x, SHORT: tl.constexpr = False):
    """log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)).

    log1p(e) / e on [0, 1] is a polynomial fit of degree 7 (relative error 3e-7) or, if ``SHORT``, for results of 16
    bits, 4 (6e-5). It keeps small step sizes accurate and needs no logarithm from the special-function unit.
    """
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    if SHORT:
        series = -0.15742724 + e * 0.041347307
        series = 0.306300971 + e * series
        series = -0.496977822 + e * series
        series = 0.99994328 + e * series
    else:
        series = 0.0433708499 - e * 0.00833649755
        series = -0.106677904 + e * series
        series = 0.176754933 + e * series
        series = -0.244704696 + e * series
        series = 0.332711867 + e * series
        series = -0.499971261 + e * series
        series = 0.999999775 + e * series
    return tl.maximum(x, 0.0) + e * series


@triton.jit
def softplus_slope(dt):
    """Derivative of softplus in terms of its value, 1 - exp(-dt), without cancellation for small step sizes."""
    series = dt * (1.0 - dt * (0.5 - dt * (0.1666666667 - dt * 0.0416666667)))
    return tl.where(dt < 0.03, series, 1.0 - tl.exp2(-dt * LOG2_E))
