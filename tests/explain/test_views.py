"""Views: what a store keeps, what a page holds, and what is refused. What pages do is tested in tests/web."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
import zlib
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from zoo import build, inputs

from manyheads import create_attention
from manyheads.explain.views import (
    AttentionStore,
    Panel,
    View,
    align,
    head_view,
    model_view,
    page,
    prettify,
    read_store,
    view_embedding,
    view_flow,
    view_heads,
    view_image,
    view_maps,
    view_model,
    view_neurons,
    view_table,
    view_text,
    write_page,
)
from manyheads.hosts.taps import AttentionCall, record

NASTY = ["</script><script>window.hacked=1</script>", "<b>&amp;", "שלום", " ", "\n", "", "\u202e", "\u2028", "\ud83d"]


def weights(layers: int = 2, heads: int = 3, n: int = 7, m: int = 9, sharp: float = 3.0) -> list[Tensor]:
    return [torch.softmax(sharp * torch.randn(1, heads, n, m), -1) for _ in range(layers)]


def shown(row: list[float], kept: int, steps: int) -> tuple[list[float], float]:
    """What is shown of a row, and its share of the mass: by loops, from the words of the docstring."""
    largest, total = max(abs(w) for w in row), sum(abs(w) for w in row)
    if largest == 0:
        return [0.0] * len(row), 1.0
    unit = math.exp(round(256 * math.log(largest)) / 256)
    order = sorted(range(len(row)), key=lambda j: -abs(row[j]))
    wanted, mass = set(), 0.0
    for j in order[: kept or len(row)]:
        if kept and mass >= 0.995 * total:
            break
        wanted.add(j)
        mass += abs(row[j])
    out, seen = [], 0.0
    for j, w in enumerate(row):
        code = min(steps, round(steps * math.sqrt(abs(w) / unit))) if j in wanted else 0
        out.append(math.copysign(unit * (code / steps) ** 2, w))
        seen += abs(w) if code else 0.0
    return out, round(1000 * seen / total) / 1000


def check_head(store: AttentionStore, layer: int, head: int, exact: Tensor) -> None:
    steps, rows = 127 if store.signed else 255, exact.double().tolist()
    expected = [shown(row, int(store.kept[layer, head]), steps) for row in rows]
    matrix = torch.from_numpy(store.matrix(layer, head)).double()
    # A weight whose square root falls between two codes may go either way: at most one code apart.
    step = exact.abs().amax(1, keepdim=True).double() / steps * 2.02
    assert bool(((matrix - torch.tensor([row for row, _ in expected])).abs() <= step).all())
    assert float((matrix - torch.tensor([row for row, _ in expected])).abs().mean()) < 1e-5
    share = torch.from_numpy(store.codes(layer, head).share)
    torch.testing.assert_close(share, torch.tensor([share for _, share in expected]).double(), rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("budget", [64, 0.0018, 0.001, 1e-6])
def test_rows_are_kept_as_a_loop_says(budget: float) -> None:
    attention = weights(n=7, m=40)
    store = AttentionStore.from_attention(attention, budget_mb=budget)
    assert (store.kept == 0).all() == (budget == 64)
    for layer in range(2):
        for head in range(3):
            check_head(store, layer, head, attention[layer][0, head])


def test_the_error_is_within_what_is_promised() -> None:
    (attention,) = weights(1, 1, 50, 60)
    exact = attention[0, 0].double()
    matrix = torch.from_numpy(AttentionStore.from_attention([attention]).matrix(0, 0)).double()
    scale = exact.amax(1, keepdim=True)
    bound = scale * ((exact / scale).sqrt() + 1 / 1020) / 255 + exact / 511 + 1e-9
    assert bool(((matrix - exact).abs() <= bound).all())
    assert float((matrix - exact).abs().max()) > 0


def test_negative_weights_are_stored_with_their_sign() -> None:
    attention = torch.randn(1, 2, 6, 8)
    for budget in (1, 1e-6):
        store = AttentionStore.from_attention([attention], budget_mb=budget)
        assert store.signed
        check_head(store, 0, 1, attention[0, 1])


def test_rows_without_weight_lose_nothing() -> None:
    attention = torch.zeros(1, 1, 3, 4)
    attention[0, 0, 1] = torch.tensor([0.5, 0.5, 0, 0])
    store = AttentionStore.from_attention([attention])
    torch.testing.assert_close(torch.from_numpy(store.matrix(0, 0)), attention[0, 0], rtol=1 / 511, atol=0)
    assert store.codes(0, 0).share.tolist() == [1, 1, 1]


def test_columns_beyond_sixteen_bits() -> None:
    attention = torch.zeros(1, 1, 2, 70_000)
    attention[..., 69_999], attention[..., 3] = 0.75, 0.25
    store = AttentionStore.from_attention([attention], budget_mb=0.001)
    rows = store.codes(0, 0)
    assert rows.column.tolist() == [3, 69_999] * 2
    torch.testing.assert_close(
        torch.from_numpy(rows.weight[:2]).double(), torch.tensor([0.25, 0.75]).double(), rtol=0.01, atol=0
    )


def test_the_budget_decides_how_much_is_kept() -> None:
    attention = weights(3, 4, 96, 96, sharp=0.5)
    tight, loose, whole = (AttentionStore.from_attention(attention, budget_mb=mb) for mb in (0.03, 0.06, 1))
    assert (tight.kept > 0).all()
    assert float(tight.share.mean()) < float(loose.share.mean()) < float(whole.share.mean())
    assert (whole.kept == 0).all()
    for store, mb in ((tight, 0.03), (loose, 0.06)):
        size = sum(len(base64.b64encode(chunk)) for row in store.chunks for chunk in row)
        assert 0.4 * mb < size / 1e6 <= mb
    assert float(tight.least_share.min()) > 0


def test_measures_are_of_the_exact_weights() -> None:
    (attention,) = weights(1, 1, 70, 70)
    store = AttentionStore.from_attention([attention], budget_mb=1e-4)
    rows = attention[0, 0].double().tolist()
    entropy = sum(-w * math.log(w) for row in rows for w in row if w) / 70
    distance = sum(w * abs(i - j) for i, row in enumerate(rows) for j, w in enumerate(row)) / 70
    assert float(store.entropy[0, 0]) == pytest.approx(entropy, rel=1e-5)
    assert store.distance is not None
    assert float(store.distance[0, 0]) == pytest.approx(distance, rel=1e-5)
    assert store.thumbs.shape == (1, 1, 24, 24)
    # Three rows and columns to a cell; the last of 24 holds one.
    for i, j in ((0, 0), (5, 23), (23, 23)):
        inside = range(3 * i, min(70, 3 * i + 3))
        cell = sum(rows[a][b] for a in inside for b in range(3 * j, min(70, 3 * j + 3))) / len(inside)
        assert abs(int(store.thumbs[0, 0, i, j]) - round(255 * math.sqrt(cell))) <= 1


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_stores_from_taps(name: str) -> None:
    model, given = build(name), inputs(name)
    with torch.no_grad(), record(model) as calls:
        model(**given)
    store = AttentionStore.from_calls(calls, batch=1, heads=[1, 3])
    assert (store.layers, store.heads) == (tuple(range(len(calls))), (1, 3))
    for layer, call in enumerate(calls):
        for place, head in enumerate((1, 3)):
            check_head(store, layer, place, call.weights([head])[1, 0])
    again = read_store(model, given, batch=1, heads=[1, 3])
    assert again.chunks == store.chunks
    assert again.key == store.key
    mean = read_store(model, given, mean=True, layers=[1])
    assert (mean.layers, mean.heads) == ((1,), (0,))
    check_head(mean, 0, 0, calls[1].weights()[0].mean(0))


def test_stores_of_mechanisms() -> None:
    torch.manual_seed(3)
    for name in ("softmax", "hedgehog"):
        mechanism = create_attention(name, 16, 4, causal=True)
        given = torch.randn(2, 9, 16)
        exact = mechanism(given, need_weights=True).weights
        with torch.no_grad(), record(mechanism) as calls:
            mechanism(given)
        store = AttentionStore.from_calls(calls, batch=1)
        assert len(store.heads) == exact.shape[1]
        check_head(store, 0, 1, exact[1, 1].detach())
    assert not isinstance(calls[0], AttentionCall)
    with pytest.raises(ValueError, match="offers no queries and keys"):
        view_neurons(calls, [str(i) for i in range(9)])


def test_notebooks_get_a_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.get_ipython", lambda: object())
    monkeypatch.setattr("IPython.display.display", shown.append)
    assert head_view(weights(1, 1, 2, 2), ["a", "b"]) is None
    assert json.loads(shown[0].spec)["views"][0]["kind"] == "head"


def test_mean_heads_is_the_mean_of_what_is_shown() -> None:
    store = AttentionStore.from_attention(weights(1, 3, 6, 6))
    expected = sum(torch.from_numpy(store.matrix(0, head)) for head in range(3)) / 3
    check_head(store.mean_heads(), 0, 0, torch.as_tensor(expected))


def test_encoder_and_decoder_must_be_told_apart() -> None:
    with pytest.raises(ValueError, match="choose one of them with stack="):
        read_store(build("bart"), inputs("bart"))
    cross = read_store(build("bart"), inputs("bart"), stack="decoder", kind="cross")
    assert (cross.n, cross.m) == (7, 13)
    assert cross.distance is None


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ([], {}, "no layer"),
        ([None], {}, "layer 0 is None"),
        ([torch.ones(3, 3)], {}, r"shape \(3, 3\)"),
        ([torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 4)], {}, "all layers must agree"),
        ([torch.full((1, 1, 2, 2), float("nan"))], {}, "layer 0, head 0 has weights that are NaN"),
        ([torch.ones(1, 1, 0, 0)], {}, "nothing to show"),
        ([torch.ones(1, 2, 3, 3)], {"layers": [1]}, "layers 0 to 0"),
        ([torch.ones(1, 2, 3, 3)], {"heads": [0, 0]}, "each once"),
        ([torch.ones(1, 2, 3, 3)], {"budget_mb": 0}, "budget_mb"),
        ([torch.ones(1, 2, 3, 3)], {"batch": 1}, "batch=1"),
    ],
)
def test_stores_refuse(attention: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionStore.from_attention(attention, **options)


def test_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="no calls"):
        AttentionStore.from_calls([])
    call = SimpleNamespace(layer=0, site=SimpleNamespace(stack="encoder", kind="self", path="a"))
    with pytest.raises(ValueError, match="each layer once"):
        AttentionStore.from_calls([call, call])
    negative = SimpleNamespace(
        layer=0, site=call.site, heads=1, weights=lambda heads, rows=slice(None): -torch.ones(1, 1, 2, 2),
        blocks=lambda heads: [slice(None)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="signed=True"):
        AttentionStore.from_calls([negative])
    assert AttentionStore.from_calls([negative], signed=True).matrix(0, 0).min() < -0.99


def test_tokens_must_fit() -> None:
    store = AttentionStore.from_attention(weights(n=3, m=3))
    for tokens, message in (([], "0 tokens for 3"), (["a"] * 4, "4 tokens for 3"), ("abc", "one string")):
        with pytest.raises(ValueError, match=message):
            view_heads(Panel(store, tokens))
    with pytest.raises(ValueError, match="0 tokens for 9 keys"):
        view_heads(Panel(AttentionStore.from_attention(weights(n=3)), ["a"] * 3))
    with pytest.raises(ValueError, match="second sentence"):
        view_heads(Panel(store, ["a"] * 3, second=3))
    with pytest.raises(ValueError, match="layer 5"):
        view_heads(Panel(store, ["a"] * 3), layer=5)


def spec_of(view: View) -> Any:
    found = re.search(r'id="mh-spec">(.*?)</script>', view.html())
    assert found is not None
    return json.loads(found[1])


def test_what_comes_from_outside_stays_text() -> None:
    store = AttentionStore.from_attention(weights(n=len(NASTY), m=len(NASTY)))
    whole = page([view_heads(Panel(store, NASTY))], title="</title><b>x", note="<i>")
    for forbidden in ("<script>window", "<b>", "<i>", "\u2028"):
        assert forbidden not in whole
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", whole)
    found = re.search(r'id="mh-spec">(.*?)</script>', whole)
    assert found is not None
    assert "<" not in found[1]
    assert json.loads(found[1])["views"][0]["data"]["panels"][0]["rows"] == NASTY
    whole.encode("utf-8")
    (run,) = re.findall(r"<script>(.*?)</script>", whole, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(run.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in whole


def test_two_views_of_a_store_share_its_bytes() -> None:
    store = AttentionStore.from_attention(weights(n=30, m=30))
    panel = Panel(store, [str(i) for i in range(30)])
    both = page([view_heads(panel), view_model(panel), view_maps(store)])
    assert len(re.findall(f'id="mh:{store.key}/1/2"', both)) == 1
    assert both == page([view_heads(panel), view_model(panel), view_maps(store)])


def test_scripts_and_styles_are_small() -> None:
    static = files("manyheads.explain.views") / "static"
    assert sum(len(each.read_bytes()) for each in static.iterdir()) < 100_000
    for each in static.iterdir():
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://(?!www\.w3)",
                             each.read_text(encoding="utf-8")), each.name  # fmt: skip


def test_pages_refuse(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="at least one view"):
        write_page(tmp_path / "page.html", [])
    with pytest.raises(ValueError, match="theme must be"):
        page([view_text(["a"], [1.0])], theme="pink")
    with pytest.raises(ValueError, match="no view of kind 'pie'"):
        page([View("pie", "Pie", {})])


def test_bertviz_arguments() -> None:
    attention = tuple(weights(3, 4, 5, 5))
    tokens = ["Ġthe", "▁cat", "Ċ", "d", "e"]
    view = head_view(attention, tokens, 2, True, 1, [0, 2], include_layers=[1, 2], html_action="return")
    assert view is not None
    assert view.data.startswith("<!doctype html>")
    data = spec_of(view)["views"][0]["data"]
    assert (data["layer"], data["heads"]) == (1, [0, 2])
    (panel,) = data["panels"]
    assert panel["rows"] == [" the", " cat", "\n", "d", "e"]
    assert panel["store"]["layers"] == [1, 2]
    assert [each["rows"] + each["columns"] for each in panel["filters"]] == [
        [0, 5, 0, 5], [0, 2, 0, 2], [2, 5, 2, 5], [0, 2, 2, 5], [2, 5, 0, 2],
    ]  # fmt: skip
    small = model_view(
        attention, tokens, prettify_tokens=False, display_mode="dark", include_heads=[3], html_action="return"
    )
    assert small is not None
    spec = spec_of(small)
    assert spec["theme"] == "dark"
    assert spec["views"][0]["data"]["panels"][0]["rows"] == tokens
    assert spec["views"][0]["data"]["panels"][0]["store"]["heads"] == [3]


def test_bertviz_arguments_of_encoder_and_decoder() -> None:
    view = head_view(
        encoder_attention=weights(2, 2, 4, 4), decoder_attention=weights(2, 2, 3, 3),
        cross_attention=weights(2, 2, 3, 4), encoder_tokens=list("abcd"), decoder_tokens=list("xyz"),
        html_action="return",
    )  # fmt: skip
    assert view is not None
    panels = view.payload["panels"]
    assert [panel["name"] for panel in panels] == ["Encoder", "Decoder", "Cross"]
    assert (panels[2]["rows"], panels[2]["columns"]) == (list("xyz"), list("abcd"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no attention was given"),
        ({"attention": weights(n=2, m=2)}, "needs tokens"),
        ({"attention": weights(n=2, m=2), "tokens": ["a", "b"], "encoder_tokens": ["a"]}, "not both"),
        ({"cross_attention": weights(n=2, m=2), "decoder_tokens": ["a", "b"]}, "cross_attention needs the tokens"),
        ({"attention": weights(n=2, m=2), "tokens": ["a"]}, "1 tokens for 2"),
        ({"attention": weights(n=2, m=2), "tokens": ["a", "b"], "html_action": "save"}, "html_action must be"),
        ({"attention": weights(n=2, m=2), "tokens": ["a", "b"]}, "none runs this"),
    ],
)
def test_bertviz_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_view(**options)


def test_prettify_leaves_letters_that_are_letters() -> None:
    assert prettify(["Ġa", "▁", "Ċ", "ĉ", "aĉa", "##b"]) == [" a", " ", "\n", "\t", "aĉa", "##b"]


def test_the_widget_holds_the_same_view() -> None:
    store = AttentionStore.from_attention(weights(n=9))
    view = view_heads(Panel(store, ["a"] * 9, ["b"] * 9))
    shown = view.widget()
    assert json.loads(shown.spec)["views"][0]["data"] == json.loads(json.dumps(view.payload))
    assert shown.blobs[f"{store.key}/1/2"] == store.chunks[1][2]
    assert "manyheads.mount" in str(shown._esm)
    assert view._repr_html_().startswith('<iframe sandbox="allow-scripts"')


def recorded(n: int = 13) -> list[Any]:
    model = build("llama")
    with torch.no_grad(), record(model) as calls:
        model(**inputs("llama", length=n))
    return calls


def planes(data: bytes, count: int) -> NDArray[np.uint16]:
    raw = np.frombuffer(zlib.decompress(data, -15), np.uint8)
    return raw[:count].astype(np.uint16) | (raw[count : 2 * count].astype(np.uint16) << 8)


def test_neurons_hold_the_queries_and_the_keys_of_their_head() -> None:
    calls = recorded()
    view = view_neurons(calls, [str(i) for i in range(13)], heads=[3])
    call, dim = calls[1], view.payload["dim"]
    numbers = planes(view.blobs[f"{view.payload['key']}/1/0"], 2 * 13 * dim).view(np.float16).astype(np.float64)
    query, key = torch.from_numpy(numbers).view(2, 13, dim)
    torch.testing.assert_close(query, call.query[0, 3].double(), rtol=1e-3, atol=1e-6)
    groups = call.heads // call.key.shape[1]
    torch.testing.assert_close(key, call.key[0, 3 // groups].double(), rtol=1e-3, atol=1e-6)
    assert view.payload["scale"][1] == pytest.approx(call.scale)
    with pytest.raises(ValueError, match="choose fewer layers or heads"):
        view_neurons(calls, [str(i) for i in range(13)], budget_mb=0.01)


def test_aligned_queries_and_keys_attend_as_before() -> None:
    query, key = torch.randn(5, 4).double(), 9 * torch.randn(5, 4).double() + 3
    moved_query, moved_key = align(query, key)
    torch.testing.assert_close((moved_query @ moved_key.T).softmax(-1), (query @ key.T).softmax(-1))
    torch.testing.assert_close(moved_query.mean(0), moved_key.mean(0))
    spread = [float((each - each.mean(0)).square().sum()) for each in (moved_query, moved_key)]
    assert spread[0] == pytest.approx(spread[1])


def test_the_embedding_is_the_principal_plane() -> None:
    from sklearn.decomposition import PCA

    calls = recorded()
    view = view_embedding(calls, [str(i) for i in range(13)], heads=[2])
    count = 2 * 13 * len(calls)
    raw = np.frombuffer(zlib.decompress(view.blobs[view.payload["points"]], -15), np.uint8)
    x, y = (raw[2 * i * count : (2 * i + 2) * count].reshape(2, -1).astype(np.uint16) for i in (0, 1))
    plane = np.stack([low | (high << 8) for low, high in (x, y)], 1)[:26].astype(np.float64)
    key = calls[0].of_heads(calls[0].key, torch.tensor([2]))[0, 0]
    both = torch.cat(align(calls[0].query[0, 2].double(), key.double())).numpy()
    pca = PCA(2).fit(both)
    expected = torch.cdist(*[torch.from_numpy(pca.transform(both))] * 2)
    found = torch.cdist(*[torch.from_numpy(plane)] * 2)
    torch.testing.assert_close(found / found.max(), expected / expected.max(), rtol=0, atol=2e-4)
    assert view.payload["explained"][0] == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-3)
    fewer = view_embedding(calls, [str(i) for i in range(13)], points=50)
    assert len(fewer.payload["positions"]) == 50 // (2 * 4 * len(calls))
    assert fewer.payload["sampled"] == 13


def test_small_planes_are_found_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many threads wait for one another at every head; afterwards there are as many as before."""
    calls, own, seen = recorded(), torch.linalg.eigh, []

    def eigh(matrix: torch.Tensor) -> Any:
        seen.append(torch.get_num_threads())
        return own(matrix)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(torch.linalg, "eigh", eigh)
        view_embedding(calls, [str(i) for i in range(13)], heads=[2])
        assert seen == [1] * len(calls)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tsne_gives_a_plane_of_its_own() -> None:
    calls = recorded()
    names = [str(i) for i in range(13)]
    neighbours = view_embedding(calls[:1], names, method="tsne", heads=[0])
    assert neighbours.payload["explained"] is None
    assert neighbours.blobs != view_embedding(calls[:1], names, heads=[0]).blobs
    with pytest.raises(ValueError, match="method must be one of"):
        view_embedding(calls, names, method="som")
    with pytest.raises(ValueError, match="leaves none"):
        view_embedding(calls, names, points=3)


def test_umap_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, names = recorded()[:1], [str(i) for i in range(13)]
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match="pip install umap-learn"):
        view_embedding(calls, names, method="umap", heads=[0])

    class Corner:
        """What umap-learn's class takes and gives, with the first two dimensions as its answer."""

        def __init__(self, n_neighbors: int, random_state: int) -> None:
            assert n_neighbors == 15

        def fit_transform(self, rows: Any) -> Any:
            return rows[:, :2].astype(np.float32)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Corner))
    found = view_embedding(calls, names, method="umap", heads=[0])
    assert found.payload["method"] == "UMAP"
    assert found.payload["explained"] is None


def test_many_inputs_in_one_map_with_their_lines() -> None:
    calls = recorded()
    few = list(recorded())
    names = [str(i) for i in range(13)]
    view = view_embedding(calls, names, more=[(few, names)], heads=[1, 2])
    assert view.payload["inputs"] == [0] * 13 + [1] * 13
    assert view.payload["positions"] == [*range(13), *range(13)]
    each, count, total = view.payload["each"], 26, 2 * 26 * 2 * len(calls)
    raw = np.frombuffer(zlib.decompress(view.blobs[view.payload["lines"]], -15), np.uint8)
    slots = total // 2 * each
    keys = (raw[:slots].astype(int) | (raw[slots : 2 * slots].astype(int) << 8)).reshape(-1, count, each)
    weights = raw[2 * slots :].reshape(-1, count, each)
    for layer, call in enumerate(calls):
        own = call.weights()[0]
        for place, head in enumerate((1, 2)):
            for i in range(13):
                best = max(range(13), key=lambda j: float(own[head, i, j]))
                row = layer * 2 + place
                assert keys[row, i, 0] == best
                assert keys[row, 13 + i, 0] == 13 + best
                assert abs(weights[row, i, 0] / 255 - float(own[head, i, best])) < 0.003
    with pytest.raises(ValueError, match="differ in layers"):
        view_embedding(calls, names, more=[(few[:1], names)])


def test_flow_takes_the_mean_over_heads() -> None:
    store = AttentionStore.from_attention(weights(2, 3, 6, 6))
    view = view_flow(store, list("abcdef"), token=-2)
    assert view.payload["token"] == 4
    assert view.payload["panel"]["store"]["heads"] == [0]
    with pytest.raises(ValueError, match="token 6 of 6"):
        view_flow(store, list("abcdef"), token=6)
    with pytest.raises(ValueError, match="self-attention"):
        view_flow(AttentionStore.from_attention(weights()), ["a"] * 7)


def test_images_are_kept_as_pixels() -> None:
    from PIL import Image

    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for image in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels) / 255):
        view = view_image(image, torch.eye(2))
        (data,) = view.blobs.values()
        assert zlib.decompress(data, -15) == pixels.tobytes()
    large = view_image(np.zeros((2048, 512), np.uint8), np.ones((4, 4)))
    assert (large.payload["height"], large.payload["width"]) == (1024, 256)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 2, 4), np.uint8), r"shape \(2, 2, 4\)"),
        (np.full((2, 2), 1.5), "pixels of float64"),
        (np.full((2, 2), np.nan), "pixels of float64"),
        (SimpleNamespace(mode="CMYK"), "mode CMYK"),
    ],
)
def test_images_are_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view_image(image, torch.eye(2))


def test_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="values have shape"):
        view_text(["a", "b"], {"grad": [1.0]})
    with pytest.raises(ValueError, match="grad: values hold NaN"):
        view_text(["a"], {"grad": [float("nan")]})
    with pytest.raises(ValueError, match="no tokens"):
        view_text([], [])
    with pytest.raises(ValueError, match="the map has shape"):
        view_image(np.zeros((2, 2)), torch.ones(3))
    with pytest.raises(ValueError, match="the same for all"):
        view_maps({"a": torch.ones(2, 3), "b": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="infinite"):
        view_table({"a": torch.full((1, 1), float("inf"))})
    with pytest.raises(ValueError, match="sort='c'"):
        view_table({"a": torch.ones(1, 1)}, sort="c")
    with pytest.raises(ValueError, match="3 layers"):
        view_table({"a": torch.ones(1, 1)}, layers=[1, 2, 3])


def test_tables_and_maps_keep_numbers_and_gaps() -> None:
    scores = {"sink": torch.tensor([[0.25, float("nan")]]), "echo": torch.tensor([[123456.789, -1.0]])}
    table = view_table(scores, layers=[7], heads=[4, 5], sort="echo")
    assert table.payload["rows"] == [[7, 4, 0.25, 123456.8], [7, 5, None, -1.0]]
    assert table.payload["sort"] == 3
    assert view_maps(scores).payload["maps"][0]["values"] == [[0.25, None]]
