"""What torch's exporter lacks: the recurrence of :mod:`mmvssm.export.recurrence` by Scan nodes. Needs onnxscript."""

import operator

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op

from . import recurrence as _operators  # noqa: F401  defines the operator

# Tokens that are scanned one after the other; longer sequences are cut into parts that are scanned side by side: fewer
# and larger steps, since each step of Scan costs the runtime several launches whatever its size.
PART = 32

# Scans of all parts at once: q, k, v, g are (parts, tokens, *, C), state is (parts, *, N, D). The bodies repeat
# themselves, because onnxscript takes each from the source of its own function.


@script()
def outputs_by_state(
    q: FLOAT[...], k: FLOAT[...], v: FLOAT[...], g: FLOAT[...], rates: FLOAT[...], state: FLOAT[...]
) -> FLOAT[...]:
    column = op.Constant(value_ints=[-1])
    row = op.Constant(value_ints=[-2])

    @graph()
    def step(state_t, q_t, k_t, v_t, g_t):
        decay = op.Exp(op.Mul(op.Unsqueeze(g_t, row), rates))
        added = op.Mul(op.Unsqueeze(k_t, column), op.Unsqueeze(v_t, row))
        new = op.Add(op.Mul(decay, state_t), added)
        y_t = op.Squeeze(op.MatMul(op.Unsqueeze(q_t, row), new), row)
        return new, y_t

    _, y = op.Scan(state, q, k, v, g, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1])
    return y


@script()
def outputs_by_row(q: FLOAT[...], k: FLOAT[...], v: FLOAT[...], g: FLOAT[...], state: FLOAT[...]) -> FLOAT[...]:
    column = op.Constant(value_ints=[-1])
    row = op.Constant(value_ints=[-2])

    @graph()
    def step(state_t, q_t, k_t, v_t, g_t):
        decay = op.Exp(op.Unsqueeze(g_t, column))
        added = op.Mul(op.Unsqueeze(k_t, column), op.Unsqueeze(v_t, row))
        new = op.Add(op.Mul(decay, state_t), added)
        y_t = op.Squeeze(op.MatMul(op.Unsqueeze(q_t, row), new), row)
        return new, y_t

    _, y = op.Scan(state, q, k, v, g, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1])
    return y


@script()
def last_state_by_state(
    k: FLOAT[...], v: FLOAT[...], g: FLOAT[...], rates: FLOAT[...], state: FLOAT[...]
) -> FLOAT[...]:
    column = op.Constant(value_ints=[-1])
    row = op.Constant(value_ints=[-2])

    @graph()
    def step(state_t, k_t, v_t, g_t):
        decay = op.Exp(op.Mul(op.Unsqueeze(g_t, row), rates))
        added = op.Mul(op.Unsqueeze(k_t, column), op.Unsqueeze(v_t, row))
        new = op.Add(op.Mul(decay, state_t), added)
        return new

    end = op.Scan(state, k, v, g, body=step, num_scan_inputs=3, scan_input_axes=[1, 1, 1])
    return end


@script()
def last_state_by_row(k: FLOAT[...], v: FLOAT[...], g: FLOAT[...], state: FLOAT[...]) -> FLOAT[...]:
    column = op.Constant(value_ints=[-1])
    row = op.Constant(value_ints=[-2])

    @graph()
    def step(state_t, k_t, v_t, g_t):
        decay = op.Exp(op.Unsqueeze(g_t, column))
        added = op.Mul(op.Unsqueeze(k_t, column), op.Unsqueeze(v_t, row))
        new = op.Add(op.Mul(decay, state_t), added)
        return new

    end = op.Scan(state, k, v, g, body=step, num_scan_inputs=3, scan_input_axes=[1, 1, 1])
    return end


@script()
def entering_states(decay: FLOAT[...], ends: FLOAT[...], state: FLOAT[...]) -> FLOAT[...]:
    """States (parts, *, N, D) in which parts begin: ``ends`` are those in which they end, had they begun with zeros."""

    @graph()
    def step(state_m, decay_m, end_m):
        new = op.Add(op.Mul(decay_m, state_m), end_m)
        entering = op.Identity(state_m)
        return new, entering

    _, states = op.Scan(state, decay, ends, body=step, num_scan_inputs=2)
    return states


def _outputs(q, k, v, g, rates, state):
    return outputs_by_row(q, k, v, g, state) if rates is None else outputs_by_state(q, k, v, g, rates, state)


def _last_state(k, v, g, rates, state):
    return last_state_by_row(k, v, g, state) if rates is None else last_state_by_state(k, v, g, rates, state)


def _ints(*values):
    return op.Constant(value_ints=list(values))


def recurrence(q, k, v, g, rates, state):
    """One Scan over all tokens, or, for more than two parts, three of 2 PART + L / PART steps together."""
    length = v.shape[0]
    if isinstance(length, int) and length <= 2 * PART:
        q, k, v, g, state = (op.Unsqueeze(t, _ints(0)) for t in (q, k, v, g, state))
        return op.Squeeze(_outputs(q, k, v, g, rates, state), _ints(0))

    length = op.Shape(v, start=0, end=1)
    parts = op.Div(op.Add(length, _ints(PART - 1)), _ints(PART))
    pads = op.Concat(_ints(0), op.Sub(op.Mul(parts, _ints(PART)), length), axis=0)

    def cut(tensor):
        """(L, *, C) to (parts, PART, *, C); what is filled up decays by nothing and adds nothing."""
        padded = op.Pad(tensor, pads, None, _ints(0))
        return op.Reshape(padded, op.Concat(parts, _ints(PART), op.Shape(tensor, start=1), axis=0))

    rest = op.Shape(v, start=1)
    q, k, v, g = (cut(tensor) for tensor in (q, k, v, g))
    # Not `state`, which enters the first part only.
    zeros = op.Expand(op.Constant(value_float=0.0), op.Concat(parts, op.Shape(state), axis=0))
    ends = _last_state(k, v, g, rates, zeros)
    total = op.ReduceSum(g, _ints(1), keepdims=0)
    if rates is None:
        decay = op.Exp(op.Unsqueeze(total, _ints(-1)))
    else:
        decay = op.Exp(op.Mul(op.Unsqueeze(total, _ints(-2)), rates))
    y = _outputs(q, k, v, g, rates, entering_states(decay, ends, state))
    y = op.Reshape(y, op.Concat(_ints(-1), rest, axis=0))
    return op.Slice(y, _ints(0), length, _ints(0))


def floordiv(a, b):
    """Python's division of integers, also of negative ones, by which the backbones round sizes up; ONNX truncates."""
    return op.Div(op.Sub(a, op.Mod(a, b)), b)


TRANSLATIONS = {
    operator.floordiv: floordiv,
    torch.ops.mmvssm_export.recurrence.default: recurrence,
}
