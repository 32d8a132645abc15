"""HiLo against loops over pixels; its limits are plain attention."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.hilo import HiLo


def build(**config):
    torch.manual_seed(0)
    return HiLo(12, 4, **config).double().eval()


def softmax_mix(q, keys, values):
    score = torch.stack([q @ k / len(q) ** 0.5 for k in keys]).exp()
    return sum(s / score.sum() * v for s, v in zip(score, values, strict=True))


def by_loops(module, x, real):
    """x [height, width, dim], pixel by pixel, over the real pixels of each square."""
    height, width, _ = x.shape
    s, d, hi, lo = module.window, module.head_dim, module.hi_heads, module.lo_heads
    squares: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in range(height):
        for j in range(width):
            if real[i, j]:
                squares.setdefault((i // s, j // s), []).append((i, j))
    means = [torch.stack([x[p] for p in pixels]).mean(0) for pixels in squares.values()]
    y = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            if not real[i, j]:
                continue
            parts = []
            if hi:
                own = [module.hi_qkv(x[p]) for p in squares[i // s, j // s]]
                q, mixed = module.hi_qkv(x[i, j])[: hi * d], []
                for h in range(hi):
                    cut, k, v = (slice((o * hi + h) * d, (o * hi + h + 1) * d) for o in range(3))
                    mixed.append(softmax_mix(q[cut], [t[k] for t in own], [t[v] for t in own]))
                parts.append(module.hi_proj(torch.cat(mixed)))
            if lo:
                coarse, q, mixed = [module.lo_kv(m) for m in means], module.lo_q(x[i, j]), []
                for h in range(lo):
                    cut, v = slice(h * d, (h + 1) * d), slice((lo + h) * d, (lo + h + 1) * d)
                    mixed.append(softmax_mix(q[cut], [t[cut] for t in coarse], [t[v] for t in coarse]))
                parts.append(module.lo_proj(torch.cat(mixed)))
            y[i, j] = torch.cat(parts)
    return y


@pytest.mark.parametrize(("alpha", "window"), [(0.5, 2), (0.25, 3), (0.7, 2), (0.0, 2), (1.0, 2), (0.5, 1)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_equation(alpha, window, bias):
    module, x = build(alpha=alpha, window=window, bias=bias), torch.randn(2, 5, 4, 12).double()
    assert module.lo_heads == (4 if window == 1 else alpha * 4 // 1)
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1], torch.ones(5, 4, dtype=torch.bool)))
    real = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    found = module(x, mask=real).output[1]
    torch.testing.assert_close(found[real[1]], by_loops(module, x[1], real[1])[real[1]])


def plain(q, k, v):
    q, k, v = (t.flatten(1, 2).unflatten(-1, (4, 3)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_windows_of_one_pixel_and_of_the_whole_grid_are_plain_attention():
    x = torch.randn(2, 3, 4, 12).double()
    module = build(window=1)
    wanted = module.lo_proj(plain(module.lo_q(x), *module.lo_kv(x).chunk(2, -1)))
    torch.testing.assert_close(module(x).output.flatten(1, 2), wanted)
    module = build(window=4, alpha=0.0)
    torch.testing.assert_close(module(x).output.flatten(1, 2), module.hi_proj(plain(*module.hi_qkv(x).chunk(3, -1))))


@torch.no_grad()
def test_weights_times_values():
    module, x = build(window=2), torch.randn(2, 3, 5, 12).double()
    result = module(x, need_weights=True)
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 4, 15).double())
    v = torch.cat([module.hi_qkv(x)[..., 12:], module.lo_kv(x)[..., 6:]], -1).flatten(1, 2)
    mixed = (result.weights @ v.unflatten(-1, (4, 3)).transpose(1, 2)).transpose(1, 2).flatten(2)
    wanted = torch.cat([module.hi_proj(mixed[..., :6]), module.lo_proj(mixed[..., 6:])], -1)
    torch.testing.assert_close(result.output.flatten(1, 2), wanted)


@torch.no_grad()
def test_hi_heads_stay_in_their_square():
    module, x = build(window=2), torch.randn(1, 4, 4, 12).double()
    weights = module(x, need_weights=True).weights[0].unflatten(-1, (4, 4))
    torch.testing.assert_close(weights[:2, 0, :2, :2].sum((-1, -2)), torch.ones(2).double())
    assert bool((weights[2:, 0] > 0).all())


def test_refusals():
    with pytest.raises(ValueError, match=r"alpha=1.5"):
        build(alpha=1.5)
    with pytest.raises(ValueError, match="cannot be called noncausal-self"):
        build()(torch.randn(1, 4, 12).double())
