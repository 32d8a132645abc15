"""Windows on grids against loops over cells."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from manyheads.functional.grid_bias import OffsetBias, OffsetLogits
from manyheads.functional.grid_extents import extents, over_extents
from manyheads.functional.grid_windows import (
    attend_windows,
    blocks,
    near,
    spread,
    windows_of,
    within_windows,
)


def pairs(windows, n):
    """Which cells meet, [n, n], each query in one window."""
    met, seen = torch.zeros(n, n, dtype=torch.bool), []
    for w, (queries, keys) in enumerate(zip(windows.queries.tolist(), windows.keys.tolist(), strict=True)):
        for (s, query), (t, key) in itertools.product(enumerate(queries), enumerate(keys)):
            if query >= 0 and key >= 0 and (windows.allowed is None or windows.allowed[w, s, t]):
                assert not met[query, key]
                met[query, key] = True
        seen += [q for q in queries if q >= 0]
    assert sorted(seen) == list(range(n))
    return met


def near_by_loops(length, window, dilation, stride, causal):
    met = torch.zeros(length, length, dtype=torch.bool)
    for i, j in itertools.product(range(length), repeat=2):
        if i % dilation != j % dilation:
            continue
        u, w, members = i // dilation, j // dilation, len(range(i % dilation, length, dilation))
        if causal:
            leader = min(u // stride * stride + stride - 1, members - 1)
            met[i, j] = w <= u and leader - w < window
        else:
            leader = min(u // stride * stride + stride // 2, members - 1)
            start = max(min(leader - window // 2, members - window), 0)
            met[i, j] = start <= w < start + window
    return met


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "dilation", "stride"), [(3, 1, 1), (4, 1, 3), (2, 3, 2), (7, 2, 1), (5, 1, 5)])
@pytest.mark.parametrize("length", [1, 2, 7, 18, 41])
def test_near(length, window, dilation, stride, causal):
    axis = near(length, window, dilation=dilation, stride=stride, causal=causal)
    wanted = near_by_loops(length, window, dilation, stride, causal)
    torch.testing.assert_close(pairs(windows_of([axis], [length]), length), wanted)


def test_axes_are_crossed():
    sizes = (5, 9, 3)
    axes = [near(5, 3, causal=True), blocks(9, 4, halo=1, shift=2), spread(3, 2)]
    met = pairs(windows_of(axes, sizes), 135).view(*sizes, *sizes)
    for (a, b, c), (d, e, f) in itertools.product(itertools.product(*map(range, sizes)), repeat=2):
        begin = (b + 2) // 4 * 4 - 2
        wanted = d <= a < d + 3 and begin - 1 <= e < begin + 5 and c % 2 == f % 2
        assert bool(met[a, b, c, d, e, f]) == wanted


@pytest.mark.parametrize("axes", [(blocks(5, 3), blocks(7, 3)), (near(5, 3), near(7, 3)), (spread(5, 2), spread(7, 2))])
def test_attention_is_the_dense_one_under_a_mask(axes):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 35, 4).double()
    windows = windows_of(axes, (5, 7))
    real = torch.rand(2, 35) < 0.6
    for seen in (None, real):
        met = pairs(windows, 35)[None, None].expand(2, 2, -1, -1)
        met = met if seen is None else met & seen[:, None, None]
        wanted = ((q * 0.5) @ k.mT).masked_fill(~met, -torch.inf).softmax(-1).nan_to_num() @ v
        mixed, weights = attend_windows(q, k, v, windows, scale=0.5, real=seen, need_weights=True)
        torch.testing.assert_close(mixed, wanted)
        torch.testing.assert_close(attend_windows(q, k, v, windows, scale=0.5, real=seen)[0], wanted)
        torch.testing.assert_close(weights @ v, wanted)
        assert bool((weights[~met] == 0).all())


def test_windows_are_kept_and_serve_a_pass_with_gradients():
    axes = [near(9, 3), near(10, 3)]
    with torch.inference_mode():
        q = torch.randn(1, 2, 90, 4)
        first = windows_of(axes, (9, 10))
        attend_windows(q, q, q, first, scale=0.5)
    assert windows_of(axes, (9, 10)) is first
    assert windows_of(axes, (9, 10), device=torch.device("meta")).queries.is_meta
    assert windows_of([near(91, 3), near(91, 3)], (91, 91)) is not windows_of([near(91, 3), near(91, 3)], (91, 91))
    x = torch.randn(1, 2, 90, 4, requires_grad=True)
    attend_windows(x, x, x, first, scale=0.5)[0].sum().backward()
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad != 0).any())


def test_windows_as_large_as_an_axis_allows_hold_cells_alone():
    for axis in (near(41, 7), near(41, 4, stride=3), near(64, 7, dilation=2)):
        assert windows_of([axis], [axis.length]).whole[1]


def test_squares_are_grids_of_their_own():
    torch.manual_seed(0)
    x, real = torch.randn(2, 5, 7, 3), torch.rand(2, 5, 7) < 0.7
    sizes = []

    def run(cells, seen):
        sizes.append(None if seen is None else int(seen.sum()))
        return cells + cells.sum((1, 2), keepdim=True)

    for there in (None, real):
        given = x if there is None else x * there[..., None]
        found = within_windows(x, there, 3, run)
        for y, z in itertools.product(range(5), range(7)):
            top, left = y // 3 * 3, z // 3 * 3
            wanted = given[:, y, z] + given[:, top : top + 3, left : left + 3].sum((1, 2))
            torch.testing.assert_close(found[:, y, z], wanted)
    within_windows(x[:, :3, :6], None, 3, run)
    assert sizes == [2 * 35, int(real.sum()), None]


def test_one_window_is_full_attention_and_places_outside_may_be_keys_of_zeros():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4).double()
    whole = windows_of([blocks(2, 2), blocks(3, 3)], (2, 3))
    full = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(attend_windows(q, k, v, whole, scale=0.5)[0], full)
    larger = windows_of([blocks(2, 4), blocks(3, 4)], (2, 3))
    torch.testing.assert_close(attend_windows(q, k, v, larger, scale=0.5)[0], full)
    more = (F.pad(k, (0, 0, 0, 10)), F.pad(v, (0, 0, 0, 10)))
    wanted = F.scaled_dot_product_attention(q, *more, scale=0.5)
    for need in (False, True):
        found, _ = attend_windows(q, k, v, larger, scale=0.5, zero_outside=True, need_weights=need)
        torch.testing.assert_close(found, wanted)


def test_each_box_of_real_cells_is_a_grid_of_its_own():
    torch.manual_seed(0)
    x, real = torch.randn(4, 4, 5, 2).double(), torch.zeros(4, 4, 5, dtype=torch.bool)
    real[0, :3, :4] = True
    real[1, 1:, 2:] = real[2, :3, :4] = True
    real[2, 1, 1] = False
    assert extents(real) == {((0, 3), (0, 4)): [0, 2], ((1, 4), (2, 5)): [1]}

    def run(part, seen):
        n = part[0, ..., 0].numel()
        return part + part.sum((1, 2), keepdim=True), torch.full((len(part), 1, n, n), 1.0 / n).double()

    output, weights = over_extents(x, real, run)
    torch.testing.assert_close(output[1, 1:, 2:], run(x[1:2, 1:, 2:], None)[0][0])
    assert not output[3].any()
    assert not output[0, 3].any()
    whole = weights.view(4, 4, 5, 4, 5)
    torch.testing.assert_close(whole[1, 1:, 2:, 1:, 2:], torch.full((3, 3, 3, 3), 1 / 9).double())
    torch.testing.assert_close(whole[1].sum(), torch.tensor(9.0).double())
    assert not over_extents(x, torch.zeros_like(real), run)[0].any()


def test_a_bias_out_of_a_table():
    bias = OffsetBias(2, (2, 3)).double()
    found = bias()
    for s, t in itertools.product(range(6), repeat=2):
        row, column = s // 3 - t // 3 + 1, s % 3 - t % 3 + 2
        torch.testing.assert_close(found[:, s, t], bias.table[row * 5 + column])


@pytest.mark.parametrize(("queries", "reach"), [(2, 4), (1, 3), (3, 3), (2, 7), (1, 1)])
def test_logits_of_offsets(queries, reach):
    torch.manual_seed(0)
    logits = OffsetLogits(4, queries, reach).double()
    q = torch.randn(2, queries**2, 3, 4).double().transpose(1, 2).requires_grad_()
    index = torch.arange(reach) - torch.arange(queries)[:, None] + reach - 1
    row, column = (
        t.flatten(2, 3).flatten(0, 1) for t in torch.broadcast_tensors(index[:, None, :, None], index[None, :, None, :])
    )
    wanted = torch.einsum("bhsd,std->bhst", q, logits.height[row] + logits.width[column])
    found = logits(q)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous()
    like, leaves = torch.randn_like(wanted), [q, logits.height, logits.width]
    torch.testing.assert_close(torch.autograd.grad(found, leaves, like), torch.autograd.grad(wanted, leaves, like))
    for s, t in itertools.product(range(queries**2), range(reach**2)):
        assert row[s, t] == t // reach - s // queries + reach - 1
        assert column[s, t] == t % reach - s % queries + reach - 1
