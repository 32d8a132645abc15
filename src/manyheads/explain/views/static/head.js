// Head view: tokens left and right, lines for what a token looks at, one colour per head.
manyheads.views.head = function (root, data, host) {
  const { el, clamp } = manyheads;
  const ROW = 22, FAINT = 0.03;
  const state = { panel: 0, layer: 0, heads: [], filter: 0, active: null, pinned: false, rows: new Map(), turn: 0 };
  const stores = data.panels.map((panel) => new manyheads.Store(panel.store, host));
  const store = () => stores[state.panel];
  const panel = () => data.panels[state.panel];
  const filter = () => panel().filters[state.filter];
  const tokens = (side) => (side === "left" ? panel().rows : panel().columns || panel().rows);
  const range = (side) => (side === "left" ? filter().rows : filter().columns);

  const controls = el("div", { class: "mh-controls" });
  const summary = el("p", { class: "mh-note" });
  const canvas = el("canvas", { "aria-hidden": "true" });
  const sides = {};
  for (const side of ["left", "right"]) {
    const label = side === "left" ? "Tokens that look (queries)" : "Tokens that are looked at (keys)";
    sides[side] = el("div", { class: `mh-side mh-${side}`, role: "listbox", tabindex: "0", "aria-label": label });
  }
  const stage = el("div", { class: "mh-stage" }, canvas, sides.left, sides.right);
  const spacer = el("div", { "aria-hidden": "true" });
  const scroller = el("div", { class: "mh-scroll" }, stage, spacer);
  const details = el("aside", { class: "mh-details", "aria-label": "What the token looks at" });
  root.append(controls, summary, el("div", { class: "mh-split" }, scroller, details));

  function choose(layer, heads) {
    const { layers, heads: numbers, n } = store();
    const start = layers.indexOf(layer == null ? layers[0] : layer);
    state.layer = start < 0 ? 0 : start;
    const wanted = heads || (n * numbers.length <= 16384 && numbers.length <= 16 ? numbers : numbers.slice(0, 1));
    state.heads = wanted.map((head) => numbers.indexOf(head)).filter((place) => place >= 0);
  }
  function toggle(place, only) {
    const has = state.heads.includes(place);
    if (only) state.heads = [place];
    else state.heads = has ? state.heads.filter((other) => other !== place) : [...state.heads, place].sort((a, b) => a - b);
    load();
  }
  function build() {
    const { layers, heads } = store();
    controls.replaceChildren();
    if (data.panels.length > 1) {
      controls.append(manyheads.select("Attention", data.panels.map((each) => each.name), (place) => {
        state.panel = place;
        state.filter = 0;
        state.active = null;
        choose(null, null);
        build();
        load();
      }, state.panel));
    }
    controls.append(manyheads.select("Layer", layers, (place) => {
      state.layer = place;
      load();
    }, state.layer));
    if (panel().filters.length > 1) {
      controls.append(manyheads.select("Show", panel().filters.map((each) => each.name), (place) => {
        state.filter = place;
        state.active = null;
        scroller.scrollTop = 0;
        render();
      }, state.filter));
    }
    const swatches = heads.map((head, place) => el("button", {
      type: "button", class: "mh-swatch", title: "Double-click or Shift: this head only", "aria-label": `Head ${head}`,
      onclick: (event) => toggle(place, event.shiftKey), ondblclick: () => toggle(place, true),
    }, String(head)));
    const every = el("button", { type: "button", class: "mh-quiet", onclick: () => { state.heads = heads.map((_, i) => i); load(); } }, "All");
    const none = el("button", { type: "button", class: "mh-quiet", onclick: () => { state.heads = []; load(); } }, "None");
    controls.swatches = swatches;
    controls.append(el("div", { class: "mh-field", role: "group", "aria-label": "Heads" },
      el("span", {}, heads.length > 1 ? "Heads" : "Head"),
      el("div", { class: "mh-swatches" }, swatches, heads.length > 1 ? [every, none] : [])));
  }
  async function load() {
    const turn = (state.turn += 1);
    const places = [...state.heads];
    try {
      const opened = await Promise.all(places.map((head) => store().head(state.layer, head)));
      if (turn !== state.turn) return;
      state.rows = new Map(places.map((head, i) => [head, opened[i]]));
    } catch (error) {
      summary.textContent = `These heads could not be opened: ${error.message}`;
      return;
    }
    summarise();
    render();
    root.dispatchEvent(new CustomEvent("mh-ready", { bubbles: true }));
  }
  function summarise() {
    const { share, leastShare, kept } = store();
    const places = state.heads;
    if (!places.length) return void (summary.textContent = "No head is chosen.");
    const least = Math.min(...places.map((head) => leastShare[state.layer][head]));
    const mean = places.reduce((sum, head) => sum + share[state.layer][head], 0) / places.length;
    const whole = places.every((head) => kept[state.layer][head] === 0);
    const most = Math.max(...places.map((head) => kept[state.layer][head]));
    summary.textContent = whole
      ? "Every weight is in this page. Point at a token, or tab to the lists and use the arrow keys."
      : `The page keeps ${most === 1 ? "the strongest weight" : `up to ${most} of the strongest weights`} of a row: ${manyheads.percent(mean)} of its mass on ` +
        `average, ${manyheads.percent(least)} in the worst row. Each row's own share is shown with it.`;
  }

  const count = (side) => range(side)[1] - range(side)[0];
  const height = () => Math.max(ROW, scroller.clientHeight);
  // Elements only for what is in sight: a text of thousands of tokens scrolls as a short one does.
  function list(side) {
    const [first, end] = range(side), top = scroller.scrollTop, node = sides[side], all = tokens(side);
    const from = first + clamp(Math.floor(top / ROW) - 1, 0, count(side));
    const to = Math.min(end, first + Math.ceil((top + height()) / ROW) + 1);
    // What stays in sight stays the same element, or a press that follows a movement would be lost.
    const kept = node.kept && node.kept.of === filter() ? node.kept : { of: filter(), items: new Map() };
    if (kept !== node.kept) node.replaceChildren();
    node.kept = kept;
    for (const [i, item] of kept.items) {
      if (i >= from && i < to) continue;
      item.remove();
      kept.items.delete(i);
    }
    for (let i = from; i < to; i++) {
      let item = kept.items.get(i);
      if (!item) {
        item = el("div", { class: "mh-item", role: "option", id: `${node.id}-${i}`, "aria-posinset": i - first + 1,
          "aria-setsize": count(side), "data-index": i, title: manyheads.plain(all[i]) },
          el("span", { class: "mh-index" }, String(i)), manyheads.token(all[i]));
        kept.items.set(i, item);
        node.append(item);
      }
      const on = state.active && state.active.side === side && state.active.index === i;
      item.setAttribute("aria-selected", String(Boolean(on)));
      item.style.top = `${(i - first) * ROW - top}px`;
    }
    const here = state.active && state.active.side === side && state.active.index >= from && state.active.index < to;
    if (here) node.setAttribute("aria-activedescendant", `${node.id}-${state.active.index}`);
    else node.removeAttribute("aria-activedescendant");
  }
  function render() {
    const tall = Math.max(count("left"), count("right")) * ROW;
    const limit = Math.max(260, Math.min(window.innerHeight * 0.72, 760));
    scroller.style.height = `${Math.min(tall, limit) + 2}px`;
    stage.style.height = `${scroller.clientHeight}px`;
    spacer.style.height = `${Math.max(0, tall - scroller.clientHeight)}px`;
    list("left");
    list("right");
    draw();
    explain();
    controls.swatches.forEach((swatch, place) => {
      const on = state.heads.includes(place);
      swatch.setAttribute("aria-pressed", String(on));
      swatch.style.setProperty("--head", manyheads.headColour(root, place));
    });
  }
  function draw() {
    const wide = stage.clientWidth, pen = manyheads.fit(canvas, wide, scroller.clientHeight);
    const left = sides.left.offsetWidth, right = wide - sides.right.offsetWidth, top = scroller.scrollTop;
    const [rows, rowsEnd] = filter().rows, [columns, columnsEnd] = filter().columns;
    const y = (index, first) => (index - first + 0.5) * ROW - top;
    // Heads side by side, so that equal lines of two heads are both seen.
    const spread = Math.min(2, 12 / Math.max(1, state.rows.size));
    let order = 0;
    const buckets = new Map();
    function line(place, row, column, weight) {
      const size = Math.min(1, Math.abs(weight));
      if (size < FAINT || row < rows || row >= rowsEnd || column < columns || column >= columnsEnd) return;
      const key = place * 32 + (weight < 0 ? 16 : 0) + Math.min(15, Math.ceil(Math.sqrt(size) * 15));
      if (!buckets.has(key)) buckets.set(key, new Path2D());
      const aside = (order - (state.rows.size - 1) / 2) * spread;
      buckets.get(key).moveTo(left, y(row, rows) + aside);
      buckets.get(key).lineTo(right, y(column, columns) + aside);
    }
    const { active } = state;
    for (const [place, opened] of state.rows) {
      if (active && active.side === "left") opened.row(active.index, (column, weight) => line(place, active.index, column, weight));
      else if (active) opened.looking(active.index, (row, weight) => line(place, row, active.index, weight));
      else {
        const from = rows + Math.max(0, Math.floor(top / ROW)), to = Math.min(rowsEnd, from + Math.ceil(height() / ROW) + 1);
        for (let i = from; i < to; i++) opened.row(i, (column, weight) => line(place, i, column, weight));
      }
      if (active) boxes(pen, place, opened, order, { left, right, wide, y });
      order += 1;
    }
    for (const [key, path] of buckets) {
      pen.strokeStyle = manyheads.headColour(root, Math.floor(key / 32));
      pen.setLineDash(key % 32 >= 16 ? [4, 3] : []);
      const strength = (key % 16) / 15;
      pen.globalAlpha = active ? Math.max(0.12, strength) : strength * strength;
      pen.lineWidth = active ? 1 + 2 * strength : 1.2;
      pen.stroke(path);
    }
    pen.globalAlpha = 1;
  }
  // Behind the tokens of the other side, a box per head, as strong as the weight.
  function boxes(pen, place, opened, order, box) {
    const toRight = state.active.side === "left", [first, end] = range(toRight ? "right" : "left");
    const from = toRight ? box.right : 0, room = toRight ? box.wide - box.right : box.left;
    const step = room / state.rows.size, top = scroller.scrollTop;
    pen.fillStyle = manyheads.headColour(root, place);
    const see = (index, weight) => {
      const at = box.y(index, first);
      if (index < first || index >= end || at < -ROW || at > top + height()) return;
      pen.globalAlpha = 0.6 * Math.sqrt(Math.min(1, Math.abs(weight)));
      pen.fillRect(from + order * step, at - ROW / 2 + 1, step - (state.rows.size > 12 ? 0 : 1), ROW - 2);
    };
    if (toRight) opened.row(state.active.index, see);
    else opened.looking(state.active.index, see);
    pen.globalAlpha = 1;
  }
  function explain() {
    const { active } = state;
    if (!active) {
      details.replaceChildren(el("p", { class: "mh-note" }, "Point at a token to see its strongest weights; press it to keep them."));
      return;
    }
    const from = active.side === "left", found = [], other = from ? "right" : "left", [first, end] = range(other);
    for (const [place, opened] of state.rows) {
      const see = (index, weight) => index >= first && index < end && found.push([Math.abs(weight), index, place, weight]);
      if (from) opened.row(active.index, see);
      else opened.looking(active.index, see);
    }
    found.sort((a, b) => b[0] - a[0]);
    const items = found.slice(0, 12).map(([, index, place, weight]) => {
      const dot = el("span", { class: "mh-dot" });
      dot.style.background = manyheads.headColour(root, place);
      const go = el("button", { type: "button", class: "mh-go", onclick: () => activate(other, index, true, true) },
        el("span", { class: "mh-index" }, String(index)), manyheads.token(tokens(other)[index]));
      return el("tr", {}, el("td", {}, dot, ` ${store().heads[place]}`), el("td", {}, go),
        el("td", { class: "mh-num" }, weight.toFixed(3)));
    });
    const title = el("h2", {}, from ? "From " : "To ", el("span", { class: "mh-index" }, String(active.index)),
      manyheads.token(tokens(active.side)[active.index]));
    const head = el("tr", {}, el("th", { scope: "col" }, "Head"), el("th", { scope: "col" }, from ? "Looks at" : "Looked at by"),
      el("th", { scope: "col", class: "mh-num" }, "Weight"));
    const more = found.length > 12 ? el("p", { class: "mh-note" }, `and ${found.length - 12} weaker`) : null;
    details.replaceChildren(title, el("table", { class: "mh-list" }, el("thead", {}, head), el("tbody", {}, items)), ...(more ? [more] : []), shares(from));
  }
  function shares(from) {
    if (!from) return el("p", { class: "mh-note" }, "Only weights that the page keeps can be listed here.");
    const lost = [...state.rows].map(([place, opened]) => [place, opened.share[state.active.index]]);
    const parts = lost.map(([place, share]) => `head ${store().heads[place]} ${manyheads.percent(share)}`);
    const whole = lost.every(([, share]) => share > 0.9995);
    return el("p", { class: "mh-note mh-kept" }, whole ? "All of this row's mass is shown." : `Share of this row's mass that is kept: ${parts.join(", ")}`);
  }

  function activate(side, index, pin, reveal) {
    if (side && (index < range(side)[0] || index >= range(side)[1])) return;
    state.active = side ? { side, index } : null;
    state.pinned = Boolean(side && pin);
    if (side && reveal) {
      const at = (index - range(side)[0]) * ROW, top = scroller.scrollTop, tall = height();
      if (at < top || at + ROW > top + tall) scroller.scrollTop = at - tall / 2;
    }
    render();
  }
  for (const side of ["left", "right"]) {
    const node = sides[side];
    node.id = manyheads.id();
    const of = (event) => event.target.closest(".mh-item");
    node.addEventListener("pointermove", (event) => {
      const item = of(event);
      if (state.pinned || !item || event.pointerType === "touch") return;
      const index = Number(item.dataset.index);
      if (!state.active || state.active.side !== side || state.active.index !== index) activate(side, index, false);
    });
    node.addEventListener("click", (event) => {
      const item = of(event);
      if (!item) return;
      const index = Number(item.dataset.index), again = state.pinned && state.active.side === side && state.active.index === index;
      if (again) activate(null);
      else activate(side, index, true);
    });
    node.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return activate(null);
      const step = manyheads.step(event, Math.floor(height() / ROW));
      if (!step) return;
      const [first, end] = range(side);
      if (step[1]) {
        const next = side === "left" ? "right" : "left", to = range(next);
        sides[next].focus();
        return activate(next, clamp(state.active ? state.active.index : to[0], to[0], to[1] - 1), true, true);
      }
      const here = state.active && state.active.side === side, start = step[0] === Infinity ? end : first;
      const now = here ? state.active.index + step[0] : start;
      activate(side, clamp(now, first, end - 1), true, true);
    });
  }
  scroller.addEventListener("pointerleave", () => !state.pinned && state.active && activate(null));
  scroller.addEventListener("scroll", () => render(), { passive: true });
  manyheads.redraw(root, render);
  choose(data.layer, data.heads);
  build();
  load();
  return {
    state,
    open({ panel: place, layer, head }) {
      state.panel = place || 0;
      state.filter = 0;
      state.active = null;
      choose(layer, [head]);
      build();
      load();
    },
  };
};
