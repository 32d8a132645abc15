"""Pages that show attention: how large they are, how fast they open, how fast they answer, in Chromium.

4,096 tokens x 32 layers x 32 heads: four heads of that length are made and stored for real; the other places hold them
again, each with its own bytes in the page. Opening is from the start of navigation until the first head is drawn; an
answer is from the pointer's event to the frame after it. bertviz: the length of the JSON that it writes for a head
view (`json.dumps` of `tolist()`, all digits), counted head by head over the same weights; the package is not run.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from playwright.sync_api import Page, sync_playwright
from torch import Tensor

from common import save
from manyheads.explain.views import AttentionStore, Panel, view_embedding, view_heads, view_model, write_page

MEASURES = ("src/manyheads/explain/views",)

LONG, LAYERS, HEADS, MADE = 4096, 32, 32, 4
TIMES = """() => {
  window.answers = [];
  document.addEventListener("pointermove", (event) => requestAnimationFrame(() => setTimeout(() =>
    window.answers.push(performance.now() - event.timeStamp))), true);
}"""
READY = "document.addEventListener('mh-ready', () => (window.ready = window.ready ?? performance.now()), true)"
PAN = """(frames) => new Promise((done) => {
  const canvas = document.querySelector(".mh-plane"), box = canvas.getBoundingClientRect(), times = [];
  const at = (kind, i) => canvas.dispatchEvent(new PointerEvent(kind, {
    pointerId: 1, clientX: box.left + 200 + 3 * i, clientY: box.top + 150 + i, bubbles: true }));
  canvas.setPointerCapture = () => {};
  at("pointerdown", 0);
  let last = performance.now(), i = 0;
  const step = () => {
    const now = performance.now();
    times.push(now - last);
    last = now;
    at("pointermove", (i += 1));
    if (i < frames) requestAnimationFrame(step);
    else { at("pointerup", i); done(times); }
  };
  requestAnimationFrame(step);
})"""


def causal_weights(heads: int, n: int) -> Tensor:
    """[heads, n, n]: noise, a liking for near tokens, and a sink."""
    scores = torch.randn(heads, n, n).mul_(2)
    away = torch.arange(n)[:, None] - torch.arange(n)
    scores -= torch.linspace(0.002, 0.05, heads)[:, None, None] * away
    scores[:, :, 0] += 6
    return scores.masked_fill_(away < 0, float("-inf")).softmax(-1)


def long_store() -> tuple[AttentionStore, float]:
    weights = causal_weights(MADE, LONG)
    start = time.perf_counter()
    few = AttentionStore.from_attention([weights], budget_mb=64 * MADE / (LAYERS * HEADS))
    seconds = (time.perf_counter() - start) / MADE

    def everywhere(values: np.ndarray) -> np.ndarray:
        return np.stack([np.roll(np.tile(values[0], (HEADS // MADE,) + (1,) * (values.ndim - 2)), layer, 0)
                         for layer in range(LAYERS)])  # fmt: skip

    chunks = tuple(tuple(few.chunks[0][(head - layer) % MADE] for head in range(HEADS)) for layer in range(LAYERS))
    names = ("kept", "thumbs", "entropy", "distance", "share", "least_share")
    tiled = {name: everywhere(getattr(few, name)) for name in names}
    return dataclasses.replace(
        few, layers=tuple(range(LAYERS)), heads=tuple(range(HEADS)), chunks=chunks, **tiled
    ), seconds


def until(page: Page, expression: str, seconds: float = 60) -> None:
    """Waits; the page's own policy forbids what `wait_for_function` does."""
    end = time.perf_counter() + seconds
    while not page.evaluate(expression):
        assert time.perf_counter() < end, f"{expression} did not come true"
        page.wait_for_timeout(5)


def opened(browser: Any, path: Path, rounds: int = 5) -> tuple[Page, float]:
    """A page of the file, and the median of the milliseconds until its first view is drawn."""
    times = []
    for _ in range(rounds):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.add_init_script(READY)
        page.goto(path.as_uri(), wait_until="commit")
        until(page, "window.ready")
        times.append(page.evaluate("window.ready"))
        if len(times) < rounds:
            page.close()
    page.wait_for_load_state("load")
    return page, statistics.median(times)


def answers(page: Page, side: str, heads: str) -> dict[str, Any]:
    """Milliseconds from the pointer's event to the frame after it, over forty tokens of a side."""
    page.evaluate("window.answers = []")
    box = page.locator(f".mh-{side}").bounding_box()
    assert box is not None
    for step in range(40):
        page.mouse.move(box["x"] + 40, box["y"] + 12 + 13 * step)
        page.wait_for_timeout(20)
    page.wait_for_timeout(200)
    times = sorted(page.evaluate("window.answers"))
    return {
        "what": f"hover {side}, {heads}", "median_ms": statistics.median(times),
        "p95_ms": times[int(0.95 * (len(times) - 1))], "target_ms": 100,
    }  # fmt: skip


def long_page(browser: Any, folder: Path) -> list[dict[str, Any]]:
    store, seconds = long_store()
    tokens = [f" token{i}" for i in range(LONG)]
    rows = []
    for kind, view in (("head", view_heads), ("model", view_model)):
        path = write_page(folder / f"{kind}.html", [view(Panel(store, tokens))], title="Long")
        page, ms = opened(browser, path)
        rows.append({
            "what": f"open, {kind} view, 4096 x 32 x 32", "page_mb": path.stat().st_size / 1e6, "ms": ms,
            "target_ms": 3000, "store_s_per_head": seconds, "mean_share_kept": float(store.share.mean()),
        })  # fmt: skip
        if kind == "head":
            page.evaluate(TIMES)
            rows += [answers(page, side, "one head") for side in ("left", "right")]
            start = time.perf_counter()
            page.get_by_role("button", name="All", exact=True).click()
            until(page, "document.querySelectorAll('.mh-swatch[aria-pressed=true]').length === 32")
            rows.append({"what": "32 heads opened and drawn", "ms": 1e3 * (time.perf_counter() - start)})
            rows += [answers(page, side, "32 heads") for side in ("left", "right")]
        page.close()
    return rows


def pan(browser: Any, folder: Path, points: int = 100_000) -> dict[str, Any]:
    """Frames while the embedding is dragged; the browser may draw in software."""
    layers, heads, dim = 12, 12, 64
    n = points // (2 * layers * heads)
    calls = [
        SimpleNamespace(
            layer=layer, site=SimpleNamespace(path="made"), query=torch.randn(1, heads, n, dim),
            key=torch.randn(1, heads, n, dim), check_heads=lambda chosen: list(range(heads)),
            of_heads=lambda key, chosen: key,
        )
        for layer in range(layers)
    ]  # fmt: skip
    view = view_embedding(calls, [str(i) for i in range(n)])
    page, ms = opened(browser, view.write(folder / "embedding.html"), 3)
    times = sorted(page.evaluate(PAN, 240)[5:])
    drawn = page.evaluate("""() => { const gl = document.createElement("canvas").getContext("webgl2");
      const info = gl && gl.getExtension("WEBGL_debug_renderer_info");
      return info ? gl.getParameter(info.UNMASKED_RENDERER_WEBGL) : String(gl); }""")
    page.close()
    return {"what": f"pan {2 * n * layers * heads} points", "open_ms": ms, "frame_median_ms": statistics.median(times),
            "frame_p95_ms": times[int(0.95 * len(times))], "frame_worst_ms": times[-1], "drawn_by": drawn}  # fmt: skip


def sizes(folder: Path, n: int = 512, layers: int = 12, heads: int = 12) -> dict[str, Any]:
    attention = [causal_weights(heads, n)[None] for _ in range(layers)]
    theirs = sum(len(json.dumps(matrix.tolist())) + 2 for weights in attention for matrix in weights[0])
    store = AttentionStore.from_attention(attention)
    path = write_page(folder / "sizes.html", [view_heads(Panel(store, [str(i) for i in range(n)]))])
    ours = path.stat().st_size
    return {"what": "page, 12 x 12 heads, 512 tokens", "ours_mb": ours / 1e6, "bertviz_mb": theirs / 1e6,
            "ratio": ours / theirs, "target": 0.25, "kept_whole": bool((store.kept == 0).all())}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        rows = [*long_page(browser, Path(folder)), pan(browser, Path(folder)), sizes(Path(folder))]
        browser.close()
    save("explain_views", "cpu", rows)


if __name__ == "__main__":
    main()
