"""H3, the Hungry Hungry Hippos layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.kernelised import in_stretches, joined, shown
from manyheads.functional.linear import checked_chunk, hide, needs_matrix, widen
from manyheads.functional.shift import causal_taps
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.state import State

CHUNK = 64


@register
class H3(Mechanism):
    """Linear attention whose keys remember a few tokens and whose memory is a state space model: compare, then recall.

        y_t = q_t . SSM_diag(SSM_shift(k) (x) v)_t = sum over j <= t of h_(t-j) (q_t . k'_j) v_j + D (q_t . k'_t) v_t
        k'_t = sum over l < taps of c_l k_(t-l),  h_l = 2 Re sum over s of C_s (lambda_s - 1) / A_s lambda_s^l

    lambda = exp(dt A) and A complex with a negative real part, A_s = -1/2 + i pi s at first; one kernel h per head, one
    c per channel. q, k, v: linear; outputs likewise. heads: the outer product is within dim / heads features; heads=dim
    multiplies element by element. State: taps - 1 rows of k and state_dim / 2 complex memories [d, d] per head.
    Source: Fu et al., arXiv:2212.14052. The paper convolves by FFT; here chunks of `chunk` tokens are matrices and the
    memory passes between them, which is linear and also decodes. Zero-order hold, as in S4D. The released D of the
    shift is its first tap here, and output channels are in the order of the inputs (head, feature).
    Weights: of its S4D kernel (disc="zoh", real_type="exp") log_decay, turn are inv_A_real, A_imag, and read is B C as
    a complex product; taps[:, l] is sum_s B_s C_(s + l) of its shift kernel, plus ssm_k_D where l = 0. Features of its
    output_linear's columns are (feature, head).
    """

    card = Card(
        name="h3",
        title="Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
        reference="arXiv:2212.14052",
        family=Family.RECURRENT,
        patterns={"causal-self"},
        time="n",
        state="1",
        example={"state_dim": 6, "taps": 3, "chunk": 4},
        notes="Its weights are signed. The state carries every token on, so that dense masks are refused.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        state_dim: int = 64,
        taps: int = 64,
        chunk: int = CHUNK,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if state_dim < 2 or state_dim % 2 or taps < 1:
            raise ValueError(
                f"h3: state_dim={state_dim}, taps={taps}; want an even state_dim of at least 2 (pairs of conjugates) "
                "and at least one tap"
            )
        self.chunk, modes = checked_chunk(self.card.name, chunk), state_dim // 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.taps = nn.Parameter(torch.randn(dim, taps) * taps**-0.5)
        self.log_step = nn.Parameter(torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)))
        self.log_decay = nn.Parameter(torch.full((heads, modes), math.log(0.5)))
        self.turn = nn.Parameter(torch.pi * torch.arange(modes).expand(heads, -1).clone())
        self.read = nn.Parameter(torch.randn(heads, modes, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(heads))

    def attend(self, x: Tensor, context: Tensor | None, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"h3: a dense mask of shape {tuple(call.dense.shape)} was given, but the state carries every token on; "
                "give key padding [batch, n] as the mask"
            )
        long = in_stretches(self, x, call)
        if long is not None:
            return long
        matrix = needs_matrix(self.card.name, seen=call.seen, dense=None, need_weights=call.need_weights)
        q, k, v = (widen(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        k = k if call.padding is None else k.masked_fill(~call.padding[..., None], 0.0)
        k = causal_taps(k, widen(self.taps), call.state, "keys")
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        k, v = hide(k, call.padding), hide(v, call.padding)
        weights = None
        if matrix:
            weights = (q @ k.mT) * _toeplitz(self._kernel(*self._modes(q, q.shape[2])))
        mixed = self._scan(q, k, v, call.state)
        if call.state is not None:
            call.state.advance(x.shape[1])
        return Result(self.o_proj(joined(mixed, x)), shown(weights, call, x))

    # -- the kernel ------------------------------------------------------------------------------------------------

    def _modes(self, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """2 C (lambda - 1) / A [h, s], and lambda^0 .. lambda^length [h, s, length + 1]; complex."""
        step, decay, turn, read = (t.to(like.dtype) for t in (self.log_step, self.log_decay, self.turn, self.read))
        a = torch.complex(-decay.exp(), turn)
        grown = step.exp()[:, None] * a
        factor = 2 * torch.view_as_complex(read.contiguous()) * (grown.exp() - 1) / a
        times = torch.arange(length + 1, device=like.device, dtype=like.dtype)
        return factor, (grown[..., None] * times).exp()

    def _kernel(self, factor: Tensor, powers: Tensor) -> Tensor:
        """h_0 + D, h_1, .. of one fewer lags than there are powers: [h, length]."""
        kernel = (factor[..., None] * powers[..., :-1]).real.sum(1)
        first = torch.zeros_like(kernel[0])
        first[0] = 1.0
        return kernel + self.skip.to(kernel.dtype)[:, None] * first

    # -- the scan --------------------------------------------------------------------------------------------------

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, state: State | None) -> Tensor:
        """[b, h, n, d] each -> [b, h, n, d], chunk by chunk. memory [b, h, d, 2 s, d]: keys decayed up to the last
        token, real parts and then imaginary ones, times values."""
        n = q.shape[2]
        factor, powers = self._modes(q, min(self.chunk, n))
        toeplitz = _toeplitz(self._kernel(factor, powers))
        memory = None if state is None else state.fixed.get("memory")
        outs = []
        for start in range(0, n, self.chunk):
            part = slice(start, min(start + self.chunk, n))
            queries, keys, values = q[:, :, part], k[:, :, part], v[:, :, part]
            size = queries.shape[2]
            out = (queries @ keys.mT * toeplitz[:, :size, :size]) @ values
            if memory is not None:
                later = factor[..., None] * powers[..., 1 : size + 1]
                ages = torch.cat((later.real, -later.imag), 1).mT  # [h, t, 2 s]
                out = out + _outer(queries, ages) @ memory.flatten(2, 3)
            outs.append(out)
            if state is not None or part.stop < n:
                memory = self._remember(memory, keys, values, powers[..., : size + 1])
        if state is not None and memory is not None:
            state.fixed["memory"] = memory
        return torch.cat([out.transpose(1, 2) for out in outs], 1).transpose(1, 2)

    def _remember(self, memory: Tensor | None, k: Tensor, v: Tensor, powers: Tensor) -> Tensor:
        left = powers[..., :-1].flip(-1)  # what is left of each token at the end of the chunk
        new = _outer(k, torch.cat((left.real, left.imag), 1).mT).mT @ v
        new = new.unflatten(2, (self.head_dim, -1))
        if memory is None:
            return new
        real, imag = memory.chunk(2, 3)
        whole = powers[..., -1][:, None, :, None]
        cos, sin = whole.real, whole.imag
        return new + torch.cat((real * cos - imag * sin, real * sin + imag * cos), 3)


def _outer(rows: Tensor, ages: Tensor) -> Tensor:
    """rows [b, h, t, d], ages [h, t, s] -> [b, h, t, d s]."""
    return (rows[..., None] * ages[:, :, None]).flatten(-2)


def _toeplitz(kernel: Tensor) -> Tensor:
    """kernel [h, t] -> [h, t, t] with kernel[i - j] at (i, j) for j <= i and zeros above."""
    t = kernel.shape[-1]
    padded = torch.cat([kernel.new_zeros(kernel.shape[0], t - 1), kernel], -1)
    return padded.unfold(-1, t, 1).flip(-1)
