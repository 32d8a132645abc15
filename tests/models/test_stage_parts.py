"""Parts of hierarchies: sequences in reading order, positions, class tokens, against loops over cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.models import ManyheadsConfig, ManyheadsForImageClassification
from manyheads.models.class_tokens import ClassToken
from manyheads.models.layouts import HEAD, STAGE, STEP, TOKEN
from manyheads.models.stage_blocks import Bottleneck, MLPBlock
from manyheads.models.stages import HierarchyHead, Positions, StageBlock, Step
from manyheads.registry import create_attention

REAL = torch.zeros(2, 4, 5, dtype=torch.bool)
REAL[0], REAL[1, :3, :2] = True, True


def shaken(module: Any) -> Any:
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@torch.no_grad()
def test_cells_are_a_sequence_for_mechanisms_of_sequences() -> None:
    torch.manual_seed(0)
    spec = {"name": "softmax", "rotary": {"base": 100.0}, "heads": 2}
    block, x = shaken(StageBlock(8, {**STAGE, "whole": True}, spec)), torch.randn(2, 4, 5, 8).double()
    found, _, weights, _ = block(x, REAL, True)
    for row, (height, width) in enumerate(((4, 5), (3, 2))):
        cells = x[row : row + 1, :height, :width].flatten(1, 2)
        wanted = block.mechanism(cells, need_weights=True)
        torch.testing.assert_close(found[row, :height, :width].flatten(0, 1), wanted.output[0])
        places = REAL[row].flatten().nonzero()[:, 0]
        torch.testing.assert_close(weights[row][:, places][:, :, places], wanted.weights[0])
    plain = block(x[:1], None, True)
    torch.testing.assert_close(plain[0], found[:1])
    torch.testing.assert_close(plain[2], weights[:1])


def test_a_mechanism_keeps_what_it_begins_with() -> None:
    layout = {"stem": [{"features": 8}], "stages": [{"dim": 8, "heads": 4, "mixers": ["convit"]}]}
    model = ManyheadsForImageClassification(ManyheadsConfig(stages=layout, num_labels=2))
    mechanism = model.hierarchy.stages[0].blocks[0].mechanism
    torch.testing.assert_close(mechanism.attention.v_proj.weight.detach(), torch.eye(8))


@torch.no_grad()
def test_positions_of_every_size() -> None:
    positions, x = Positions(3, (4, 5)).double(), torch.randn(2, 4, 5, 3).double()
    found = positions(x, REAL)
    torch.testing.assert_close(found[0], x[0] + positions.table)
    small = F.interpolate(positions.table.movedim(-1, 0)[None], (3, 2), mode="bilinear")[0].movedim(0, -1)
    torch.testing.assert_close(found[1, :3, :2], x[1, :3, :2] + small)
    torch.testing.assert_close(positions(x[1:, :3, :2], None)[0], x[1, :3, :2] + small)
    torch.testing.assert_close(positions(x, None), x + positions.table)


@pytest.mark.parametrize("begins", ["learnt", "mean"])
@pytest.mark.parametrize("moves", ["token", "all"])
@torch.no_grad()
def test_a_class_token(begins: str, moves: str) -> None:
    torch.manual_seed(0)
    settings = {**TOKEN, "depth": 2, "heads": 2, "mlp_ratio": 1.5, "begins": begins, "moves": moves}
    token, x = shaken(ClassToken(8, 1e-6, settings)), torch.randn(2, 4, 5, 8).double()
    read, cells = token(x, REAL)
    for row in range(2):
        rows = list(x[row][REAL[row]])
        rows.insert(0, token.start[0, 0] if begins == "learnt" else torch.stack(rows).mean(0))
        for block in token.blocks:
            rows = stepped(block, rows, moves == "all")
        torch.testing.assert_close(read[row], rows[0])
        torch.testing.assert_close(cells[row][REAL[row]], torch.stack(rows[1:]))


def stepped(block: Any, rows: list[Tensor], everyone: bool) -> list[Tensor]:
    layer, new = block.attention, list(rows)
    normed = [block.norm(row) for row in rows]
    for i in range(len(rows) if everyone else 1):
        mixed = []
        for cut in (slice(0, 4), slice(4, 8)):
            q = layer.q_proj(normed[i])[cut]
            weights = torch.stack([q @ layer.k_proj(row)[cut] / 2 for row in normed]).softmax(0)
            mixed.append(sum(w * layer.v_proj(row)[cut] for w, row in zip(weights, normed, strict=True)))
        new[i] = rows[i] + layer.o_proj(torch.cat(mixed))
        new[i] = new[i] + block.mlp.down(F.gelu(block.mlp.up(block.norm_mlp(new[i]))))
    return new


@torch.no_grad()
def test_cells_vote_beside_a_dense_token() -> None:
    torch.manual_seed(0)
    head = shaken(HierarchyHead(8, 200, {**HEAD, "token": {**TOKEN, "dense": True}}))
    x = torch.randn(2, 4, 5, 8).double()
    token, cells = head.token(x, REAL)
    most = torch.stack([head.cell_classifier(head.norm(cells[row][REAL[row]])).amax(0) for row in range(2)])
    wanted = head.classifier(head.norm(token)) + 0.5 * most
    torch.testing.assert_close(head(torch.where(REAL[..., None], x, 1e4), REAL), wanted)


def test_a_token_learns_and_half_precision_works() -> None:
    token = {"moves": "all", "heads": 2, "dense": True}
    layout: dict[str, Any] = {"stem": [{"features": 8}], "head": {"token": token}}
    layout["stages"] = [{"dim": 8, "mixers": ["softmax"], "positions": [3, 3]}]
    model = ManyheadsForImageClassification(ManyheadsConfig(stages=layout, num_labels=2, num_channels=1))
    mask = torch.ones(2, 8, 8)
    mask[1, 4:] = 0
    model(torch.randn(2, 1, 8, 8), labels=torch.tensor([0, 1]), pixel_mask=mask).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.bfloat16()(torch.randn(2, 1, 8, 8), pixel_mask=mask).logits.dtype == torch.bfloat16


def test_steps_in_groups_and_without_bias() -> None:
    step = Step(4, {**STEP, "features": 4, "groups": 4, "bias": False})
    assert [tuple(p.shape) for p in step.parameters()] == [(4, 1, 2, 2)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head": {"token": {"moves": "some"}}}, r"head.token.moves='some'"),
        ({"head": {"token": {"begins": "zero"}}}, r"head.token.begins='zero'"),
        ({"head": {"token": {"head": 2}}}, r"head.token has no 'head'"),
        ({"head": {"token": {"heads": 3}}}, r"heads=3.*divisor of the 8"),
        ({"stages": [{"dim": 8, "mixers": ["softmax"], "positions": [14]}]}, r"stages\[0\].positions=\[14\]"),
        ({"stages": [{"dim": 8, "mixers": ["softmax"], "positions": 14}]}, r"stages\[0\].positions=14"),
        ({"stem": [{"features": 8, "groups": 2}]}, "groups=2"),
    ],
)
def test_what_no_layout_has_is_refused(change: dict[str, Any], words: str) -> None:
    layout = {"stem": [{"features": 8}], "stages": [{"dim": 8, "mixers": ["softmax"]}], **change}
    with pytest.raises(ValueError, match=words):
        ManyheadsForImageClassification(ManyheadsConfig(stages=layout))


def test_plain_attention_of_a_stage_is_that_of_torch() -> None:
    torch.manual_seed(0)
    block = StageBlock(8, {**STAGE, "whole": True}, {"name": "softmax", "heads": 2, "shell": {"bias": {"o": True}}})
    layer, x = block.mechanism.double(), torch.randn(1, 3, 4, 8).double()
    assert [name for name, _ in layer.named_parameters() if "bias" in name] == ["o_proj.bias"]
    assert type(layer) is type(create_attention("softmax", 8, 2))
    there = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        there.in_proj_weight.copy_(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))
        there.in_proj_bias.zero_()
        there.out_proj.weight.copy_(layer.o_proj.weight)
        there.out_proj.bias.copy_(layer.o_proj.bias)
    rows = x.flatten(1, 2)
    torch.testing.assert_close(block(x, None)[0].flatten(1, 2), there(rows, rows, rows)[0])


@torch.no_grad()
def test_a_bottleneck_around_a_mixer_that_steps_down() -> None:
    torch.manual_seed(0)
    spec = {"name": "halonet", "block": 2, "halo": 1, "stride": 2}
    block = shaken(Bottleneck(6, {**STAGE, "dim": 8, "heads": 2, "bottleneck": 0.5}, spec))
    x = torch.randn(2, 4, 5, 6).double()
    found, reached, _, _ = block(x, REAL)

    def normed(norm: Any, cells: Tensor) -> Tensor:
        return (cells - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias

    for row, (height, width) in enumerate(((4, 5), (3, 2))):
        own = x[row : row + 1, :height, :width]
        inner = block.mechanism(normed(block.norm_narrow, own @ block.narrow.weight.T).relu()).output
        wide = normed(block.norm_wide, normed(block.norm_mixed, inner).relu() @ block.widen.weight.T)
        beside = normed(block.norm_shortcut, own[:, ::2, ::2] @ block.shortcut.weight.T)
        wanted = (wide + beside).relu()[0]
        torch.testing.assert_close(found[row][: wanted.shape[0], : wanted.shape[1]], wanted)
        assert int(reached[row].sum()) == wanted[..., 0].numel()
    same = Bottleneck(8, {**STAGE, "dim": 8, "heads": 2, "bottleneck": 1.0}, {**spec, "stride": 1})
    assert same.shortcut is None


@torch.no_grad()
def test_a_block_without_a_mixer() -> None:
    block = shaken(MLPBlock(6, {**STAGE, "mlp_ratio": 2.0, "layer_scale": 0.5}))
    x = torch.randn(1, 3, 4, 6).double()
    found, _, weights, _ = block(x, None)
    hidden = F.gelu(block.mlp.up_proj(block.norm(x)))
    torch.testing.assert_close(found, x + block.scale * block.mlp.down_proj(hidden))
    assert weights is None


@torch.no_grad()
def test_a_step_with_a_maximum_behind_it() -> None:
    torch.manual_seed(0)
    step = shaken(Step(3, {**STEP, "features": 5, "kernel": 3, "stride": 1, "padding": 1, "pool": True}))
    x = torch.randn(2, 4, 5, 3).double()
    found, reached = step(x, REAL)
    for row, (height, width) in enumerate(((4, 5), (3, 2))):
        own = step.conv(x[row : row + 1, :height, :width].movedim(-1, 1))[0]
        assert int(reached[row].sum()) == -(-height // 2) * -(-width // 2)
        for i in range(0, height, 2):
            for j in range(0, width, 2):
                near = own[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                torch.testing.assert_close(found[row, i // 2, j // 2], near.amax((1, 2)))
    torch.testing.assert_close(step(x[:1], None)[0], found[:1])


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"bottleneck": 2}, "bottleneck=2"),
        ({"bottleneck": 0.5, "down": {}}, "down=None"),
        ({"bottleneck": 0.5, "mixers": ["none"]}, "none"),
    ],
)
def test_a_bottleneck_that_is_none_is_refused(stage: Any, words: str) -> None:
    layout = {"stem": [{"features": 4}], "stages": [{"dim": 4, "mixers": ["halonet"], **stage}]}
    with pytest.raises(ValueError, match=words):
        ManyheadsConfig(stages=layout)
    with pytest.raises(ValueError, match="want one group"):
        Step(4, {**STEP, "features": 4, "groups": 2, "deforms": True})
