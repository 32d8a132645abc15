// Neuron view: for one token, its query, the keys, and their product dimension by dimension.
manyheads.views.neuron = function (root, data, host) {
  const { el, clamp } = manyheads;
  const SHOWN = 24;
  const store = new manyheads.Store(data.panel.store, host);
  const rows = data.panel.rows, columns = data.panel.columns || rows;
  const state = { layer: 0, head: 0, query: Math.min(1, rows.length - 1), key: null, turn: 0 };
  const summary = el("p", { class: "mh-note" });
  const queries = el("div", { class: "mh-picks", role: "listbox", tabindex: "0", "aria-label": "Token that looks (query)" });
  const pair = el("div", { class: "mh-pair" });
  const body = el("tbody", {});
  const table = el("table", { class: "mh-list mh-neurons" }, el("thead", {}, el("tr", {},
    ...["Key", "query × key, by dimension", "Score", "Weight"].map((name, i) => el("th", { scope: "col", class: i > 1 ? "mh-num" : "" }, name)))), body);
  root.append(
    el("div", { class: "mh-controls" },
      manyheads.select("Layer", store.layers, (place) => { state.layer = place; load(); }),
      manyheads.select("Head", store.heads, (place) => { state.head = place; load(); }),
      manyheads.legend("negative", "positive", true)),
    summary,
    el("div", { class: "mh-columns" }, queries, el("div", { class: "mh-grow" }, pair, el("div", { class: "mh-wide" }, table))));
  let open = null;

  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1, power = (bits >> 10) & 31, part = bits & 1023;
    return sign * (power ? 2 ** (power - 15) * (1 + part / 1024) : 2 ** -14 * (part / 1024));
  };
  async function load() {
    const turn = (state.turn += 1);
    const name = `${data.key}/${state.layer}/${state.head}`;
    const [bytes, weights] = await Promise.all([manyheads.blob(host, name), store.head(state.layer, state.head)]);
    if (turn !== state.turn) return;
    const count = bytes.length / 2, numbers = new Float32Array(count);
    for (let i = 0; i < count; i++) numbers[i] = half(bytes[i] | (bytes[count + i] << 8));
    const split = rows.length * data.dim;
    open = { query: numbers.subarray(0, split), key: numbers.subarray(split), weights };
    render();
    root.dispatchEvent(new CustomEvent("mh-ready", { bubbles: true }));
  }
  const vector = (kind, i) => open[kind].subarray(i * data.dim, (i + 1) * data.dim);
  function strip(values, most, label, tall) {
    const canvas = el("canvas", { class: "mh-strip", role: "img", "aria-label": label, width: values.length, height: 1 });
    const pen = canvas.getContext("2d"), image = pen.createImageData(values.length, 1), dark = manyheads.dark(root);
    values.forEach((value, i) => image.data.set([...manyheads.rgb(dark, value / (most || 1)), 255], 4 * i));
    pen.putImageData(image, 0, 0);
    canvas.style.height = `${tall}px`;
    return canvas;
  }
  const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  function render() {
    if (!open) return;
    const query = vector("query", state.query), scale = data.scale[state.layer], found = [];
    const weights = new Float32Array(columns.length);
    open.weights.row(state.query, (column, weight) => (weights[column] = weight));
    for (let j = 0; j < columns.length; j++) {
      const product = vector("key", j).map((value, d) => value * query[d]);
      found.push({ j, product, score: scale * product.reduce((a, b) => a + b, 0), weight: weights[j] });
    }
    found.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight) || b.score - a.score);
    const top = found.slice(0, SHOWN), most = Math.max(...top.map((each) => largest(each.product)));
    const chosen = found.find((each) => each.j === state.key) || found[0];
    body.replaceChildren(...top.map((each) => el("tr", { class: each === chosen ? "mh-chosen" : "" },
      el("td", {}, el("button", { type: "button", class: "mh-go", "aria-pressed": String(each === chosen), onclick: () => { state.key = each.j; render(); } },
        el("span", { class: "mh-index" }, String(each.j)), manyheads.token(columns[each.j]))),
      el("td", {}, strip(each.product, most, "query times key", 16)),
      el("td", { class: "mh-num" }, each.score.toFixed(2)), el("td", { class: "mh-num" }, each.weight.toFixed(3)))));
    explain(query, chosen);
    const share = open.weights.share[state.query];
    summary.textContent = `Score: the sum over ${data.dim} dimensions × ${manyheads.number(scale)}. ` +
      (found.length > SHOWN ? `The ${SHOWN} keys with the largest weight of ${found.length}. ` : "") +
      (share > 0.9995 ? "" : `${manyheads.percent(share)} of this row's mass is kept; weights that are not show as 0.`);
    list();
  }
  function explain(query, chosen) {
    const key = vector("key", chosen.j), order = [...chosen.product.keys()].sort((a, b) => Math.abs(chosen.product[b]) - Math.abs(chosen.product[a]));
    const line = (name, values) => el("div", { class: "mh-line" }, el("span", {}, name), strip(values, largest(values), name, 24));
    const tops = order.slice(0, 5).map((d) => `${d}: ${chosen.product[d].toFixed(2)}`).join(", ");
    pair.replaceChildren(
      el("h2", {}, manyheads.token(rows[state.query]), " looks at ", manyheads.token(columns[chosen.j]), ` with ${chosen.weight.toFixed(3)}`),
      line("query", query), line("key", key), line("product", chosen.product),
      el("p", { class: "mh-note" }, `Strongest dimensions: ${tops}`));
  }
  function list() {
    if (!queries.childElementCount) {
      queries.append(...rows.map((token, i) => el("div", { class: "mh-pick", role: "option", id: manyheads.id(), "data-index": i },
        el("span", { class: "mh-index" }, String(i)), manyheads.token(token))));
    }
    const before = queries.querySelector("[aria-selected=true]"), now = queries.children[state.query];
    if (before) before.setAttribute("aria-selected", "false");
    now.setAttribute("aria-selected", "true");
    queries.setAttribute("aria-activedescendant", now.id);
    const top = now.offsetTop - queries.offsetTop;
    if (top < queries.scrollTop || top + 30 > queries.scrollTop + queries.clientHeight) queries.scrollTop = top - 60;
  }
  const pick = (index) => {
    state.query = clamp(index, 0, rows.length - 1);
    state.key = null;
    render();
  };
  queries.addEventListener("click", (event) => {
    const item = event.target.closest(".mh-pick");
    if (item) pick(Number(item.dataset.index));
  });
  queries.addEventListener("keydown", (event) => {
    const step = manyheads.step(event);
    if (step) pick(state.query + step[0] + step[1]);
  });
  manyheads.redraw(root, render);
  load();
};
