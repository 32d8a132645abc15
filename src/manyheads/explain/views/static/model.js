// Model view: a small picture of every head; one that is chosen opens in a head view in the same place.
manyheads.views.model = function (root, data, host) {
  const { el, clamp } = manyheads;
  const state = { panel: 0, at: [0, 0], sprite: null, drawn: "" };
  const stores = data.panels.map((panel) => new manyheads.Store(panel.store, host));
  const store = () => stores[state.panel];
  const controls = el("div", { class: "mh-controls" });
  const caption = el("p", { class: "mh-caption", "aria-live": "polite" });
  const grid = el("div", { class: "mh-grid", role: "grid", "aria-label": "Heads: layers down, heads across" });
  const overview = el("div", {}, controls, caption, el("div", { class: "mh-wide" }, grid));
  const inside = el("div", { hidden: true });
  root.append(overview, inside);
  let cells = [];

  function build() {
    const { layers, heads } = store();
    controls.replaceChildren();
    if (data.panels.length > 1) {
      controls.append(manyheads.select("Attention", data.panels.map((each) => each.name), (place) => {
        state.panel = place;
        state.at = [0, 0];
        build();
        paint();
      }, state.panel));
    }
    controls.append(manyheads.legend("no weight", "all weight"));
    grid.style.setProperty("--heads", heads.length);
    const top = el("div", { role: "row", class: "mh-row" }, el("span", { class: "mh-corner", role: "columnheader" }, "layer"),
      heads.map((head) => el("span", { class: "mh-top", role: "columnheader" }, String(head))));
    cells = layers.map((layer, l) => heads.map((head, h) => el("button", {
      type: "button", class: "mh-thumb", role: "gridcell", tabindex: l + h ? "-1" : "0", "aria-label": `Layer ${layer}, head ${head}`,
      "data-at": `${l},${h}`,
    })));
    const rows = layers.map((layer, l) => el("div", { role: "row", class: "mh-row" },
      el("span", { class: "mh-edge", role: "rowheader" }, String(layer)), cells[l]));
    grid.replaceChildren(top, ...rows);
    tell(null);
  }
  function tell(at) {
    const { layers, heads, entropy, distance, share } = store();
    if (!at) {
      caption.textContent = `${layers.length} layers × ${heads.length} heads. Rows of a picture are tokens that look, columns ` +
        "tokens that are looked at. Press a picture to open its head.";
      return;
    }
    const [l, h] = at;
    caption.textContent = `Layer ${layers[l]}, head ${heads[h]}: entropy ${manyheads.number(entropy[l][h])} nats` +
      (distance ? `, mean distance ${manyheads.number(distance[l][h])} tokens` : "") +
      `, ${manyheads.percent(share[l][h])} of the mass kept`;
  }
  // All pictures are one image, of which every button shows its part.
  async function paint() {
    const { layers, heads, thumb, key } = store(), dark = manyheads.dark(root), now = `${key} ${dark}`;
    if (state.drawn === now) return;
    state.drawn = now;
    const codes = await store().thumbs(), [tall, wide] = thumb;
    if (state.drawn !== now) return;
    const canvas = el("canvas", { width: heads.length * wide, height: layers.length * tall });
    const pen = canvas.getContext("2d"), image = pen.createImageData(canvas.width, canvas.height);
    const ramp = Array.from({ length: 256 }, (_, code) => manyheads.rgb(dark, code / 255));
    let place = 0;
    for (let l = 0; l < layers.length; l++)
      for (let h = 0; h < heads.length; h++)
        for (let i = 0; i < tall; i++)
          for (let j = 0; j < wide; j++, place++) {
            const at = 4 * ((l * tall + i) * canvas.width + h * wide + j);
            image.data.set(ramp[codes[place]], at);
            image.data[at + 3] = 255;
          }
    pen.putImageData(image, 0, 0);
    const url = await new Promise((done) => canvas.toBlob((blob) => done(URL.createObjectURL(blob))));
    if (state.sprite) URL.revokeObjectURL(state.sprite);
    state.sprite = url;
    grid.style.setProperty("--sprite", `url("${url}")`);
    grid.style.setProperty("--size", `${heads.length * 100}% ${layers.length * 100}%`);
    const part = (i, all) => (all > 1 ? (100 * i) / (all - 1) : 0);
    cells.forEach((row, l) => row.forEach((cell, h) => (cell.style.backgroundPosition = `${part(h, heads.length)}% ${part(l, layers.length)}%`)));
    root.dispatchEvent(new CustomEvent("mh-ready", { bubbles: true }));
  }
  function move(l, h, focus) {
    cells[state.at[0]][state.at[1]].tabIndex = -1;
    state.at = [l, h];
    cells[l][h].tabIndex = 0;
    if (focus) cells[l][h].focus();
  }
  function back() {
    inside.hidden = true;
    inside.replaceChildren();
    overview.hidden = false;
    cells[state.at[0]][state.at[1]].focus();
  }
  function open(l, h) {
    move(l, h, false);
    overview.hidden = true;
    inside.hidden = false;
    const button = el("button", { type: "button", class: "mh-quiet", onclick: back }, "← All heads");
    const pane = el("div", {});
    inside.replaceChildren(button, pane);
    const panels = [data.panels[state.panel]];
    manyheads.views.head(pane, { panels, layer: store().layers[l], heads: [store().heads[h]] }, host);
    button.focus();
  }
  const at = (event) => {
    const cell = event.target.closest(".mh-thumb");
    return cell ? cell.dataset.at.split(",").map(Number) : null;
  };
  grid.addEventListener("pointerover", (event) => tell(at(event)));
  grid.addEventListener("pointerleave", () => tell(null));
  grid.addEventListener("focusin", (event) => tell(at(event)));
  grid.addEventListener("click", (event) => at(event) && open(...at(event)));
  grid.addEventListener("keydown", (event) => {
    const step = manyheads.step(event, 8);
    if (step) move(clamp(state.at[0] + step[0], 0, cells.length - 1), clamp(state.at[1] + step[1], 0, cells[0].length - 1), true);
  });
  inside.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.target.closest("[role=listbox]")) back();
  });
  manyheads.redraw(root, paint);
  build();
  paint();
  return {
    open({ panel, layer, head }) {
      state.panel = panel || 0;
      build();
      paint();
      open(Math.max(0, store().layers.indexOf(layer)), Math.max(0, store().heads.indexOf(head)));
    },
  };
};
