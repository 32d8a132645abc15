// Flow view: where one token's last layer comes from, layer by layer, by the strongest links.
manyheads.views.flow = function (root, data, host) {
  const { el, clamp } = manyheads;
  const store = new manyheads.Store(data.panel.store, host), tokens = data.panel.rows, depth = store.layers.length;
  const state = { token: data.token, top: 6, layers: null, focus: null };
  const summary = el("p", { class: "mh-note" }), told = el("p", { class: "mh-caption", "aria-live": "polite" });
  const NS = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes, ...children) => {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const picture = draw("svg", { class: "mh-flow", role: "group", "aria-label": "Flow of one token through the layers" });
  const field = el("input", { type: "number", min: 0, max: tokens.length - 1, value: state.token, "aria-label": "Position of the token" });
  const name = el("span", {});
  field.addEventListener("input", () => {
    const wanted = Number(field.value);
    if (field.value !== "" && Number.isInteger(wanted) && wanted >= 0 && wanted < tokens.length) pick(wanted);
  });
  const counts = [3, 6, 10, 16];
  root.append(el("div", { class: "mh-controls" },
    el("label", { class: "mh-field" }, el("span", {}, "Token"), field, name),
    manyheads.select("Tokens per layer", counts, (place) => { state.top = counts[place]; trace(); }, 1)),
  summary, told, el("div", { class: "mh-wide" }, picture));

  function pick(token) {
    state.token = token;
    field.value = token;
    trace();
  }
  // Mass 1 starts at the token above the last layer; each layer hands it on by half its mean weights and half as it is.
  function trace() {
    if (!state.layers) return;
    let now = new Map([[state.token, 1]]);
    const nodes = [now], links = [];
    for (let l = depth - 1; l >= 0; l--) {
      const next = new Map(), parts = [];
      for (const [i, mass] of now) {
        const add = (j, part) => {
          parts.push([i, j, part]);
          next.set(j, (next.get(j) || 0) + part);
        };
        let own = 0.5;
        state.layers[l].row(i, (j, weight) => (j === i ? (own += 0.5 * weight) : add(j, 0.5 * mass * weight)));
        add(i, mass * own);
      }
      now = new Map([...next].sort((a, b) => b[1] - a[1]).slice(0, state.top));
      nodes.unshift(now);
      links.unshift(parts.filter(([, j]) => now.has(j)));
    }
    state.nodes = nodes;
    state.links = links;
    state.focus = null;
    render();
  }
  function render() {
    if (!state.nodes) return;
    const used = [...new Set(state.nodes.flatMap((layer) => [...layer.keys()]))].sort((a, b) => a - b);
    const place = new Map(used.map((token, i) => [token, i]));
    const narrow = root.clientWidth < 560, side = narrow ? 84 : 150, wide = Math.max(root.clientWidth - 12, side * 2 + depth * (narrow ? 30 : 44)), tall = used.length * 26 + 46;
    const x = (l) => side + ((wide - 2 * side) * l) / depth, y = (token) => 40 + place.get(token) * 26;
    const ramp = manyheads.dark(root) ? "#74bdf5" : "#0a5fa8";
    const short = (text) => (text.length > (narrow ? 8 : 16) ? `${text.slice(0, narrow ? 7 : 15)}…` : text);
    // Tokens that only pass through have no circle in the input and stand paler.
    const texts = (at, anchor, layer, all) => all.map((token) => draw("text", { x: at, y: y(token) + 4, "text-anchor": anchor, direction: "ltr",
      class: layer.has(token) ? "mh-svg-token" : "mh-svg-token mh-svg-past" }, `${token}  \u2068${short(manyheads.plain(tokens[token]))}\u2069`));
    const lines = state.links.flatMap((parts, l) => parts.filter((part) => part[2] > 0.002).map(([i, j, part]) => draw("path", {
      d: `M${x(l)} ${y(j)}C${(x(l) + x(l + 1)) / 2} ${y(j)} ${(x(l) + x(l + 1)) / 2} ${y(i)} ${x(l + 1)} ${y(i)}`,
      fill: "none", stroke: ramp, "stroke-width": (0.6 + 13 * part).toFixed(2), "stroke-opacity": (0.25 + 0.6 * part).toFixed(2),
    })));
    const dots = state.nodes.flatMap((layer, l) => [...layer].map(([token, mass], order) => {
      const text = `${l ? `After layer ${store.layers[l - 1]}` : "Input"}: token ${token} “${manyheads.plain(tokens[token])}” holds ${manyheads.percent(mass)}`;
      const dot = draw("circle", { cx: x(l), cy: y(token), r: (3.5 + 7 * Math.sqrt(mass)).toFixed(1), fill: ramp, class: "mh-node", role: "button",
        tabindex: l === 0 && order === 0 ? 0 : -1, "aria-label": `${text}. Press to trace this token.`, "data-at": `${l},${token}` });
      const tell = () => (told.textContent = text);
      dot.addEventListener("pointerenter", tell);
      dot.addEventListener("focus", tell);
      dot.addEventListener("click", () => pick(token));
      return dot;
    }));
    const heads = state.nodes.map((_, l) => draw("text", { x: x(l), y: 16, "text-anchor": "middle", class: "mh-svg-soft" }, l ? String(store.layers[l - 1]) : "input"));
    picture.setAttribute("width", wide);
    picture.setAttribute("height", tall);
    picture.replaceChildren(...heads, ...lines, ...dots, ...texts(side - 16, "end", state.nodes[0], used), ...texts(wide - side + 18, "start", state.nodes[depth], [state.token]));
    const left = [...state.nodes[0].values()].reduce((a, b) => a + b, 0);
    name.replaceChildren(manyheads.token(tokens[state.token]));
    summary.textContent = `Mean over heads, half of each layer carried by the residual stream. At most ${state.top} tokens per layer are ` +
      `followed: ${manyheads.percent(left)} of the flow is shown.`;
    told.textContent = told.textContent || "Point at a circle, or tab to it and use the arrow keys.";
  }
  picture.addEventListener("keydown", (event) => {
    const node = event.target.closest(".mh-node");
    if (!node) return;
    const [l, token] = node.dataset.at.split(",").map(Number);
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return pick(token);
    }
    const step = manyheads.step(event);
    if (!step) return;
    const to = clamp(l + step[1], 0, depth), inside = [...state.nodes[to].keys()].sort((a, b) => a - b);
    const near = inside.reduce((best, each, i) => (Math.abs(each - token) < Math.abs(inside[best] - token) ? i : best), 0);
    const next = inside[clamp(near + step[0], 0, inside.length - 1)], found = picture.querySelector(`[data-at="${to},${next}"]`);
    if (found) found.focus();
  });
  manyheads.redraw(root, render);
  Promise.all(store.layers.map((_, l) => store.head(l, 0))).then((layers) => {
    state.layers = layers;
    trace();
    root.dispatchEvent(new CustomEvent("mh-ready", { bubbles: true }));
  });
};
