// Maps over layers and heads: one number per head, as a heatmap.
manyheads.views.maps = function (root, data, host) {
  const { el, clamp } = manyheads;
  const state = { map: 0, at: [0, 0] };
  const told = el("p", { class: "mh-caption", "aria-live": "polite" }), legend = el("span", {});
  const grid = el("div", { class: "mh-grid", role: "grid", "aria-label": "Layers down, heads across" });
  root.append(el("div", { class: "mh-controls" },
    data.maps.length > 1 ? manyheads.select("Measure", data.maps.map((each) => each.name), (place) => { state.map = place; render(); }) : null, legend),
  told, el("div", { class: "mh-wide" }, grid));
  grid.style.setProperty("--heads", data.heads.length);
  const opens = host.has("head") || host.has("model");
  const cells = data.layers.map((layer, l) => data.heads.map((head, h) => el("button", {
    type: "button", class: "mh-cell", role: "gridcell", tabindex: l + h ? "-1" : "0", "data-at": `${l},${h}`,
  })));
  grid.append(el("div", { role: "row", class: "mh-row" }, el("span", { class: "mh-corner", role: "columnheader" }, "layer"),
    data.heads.map((head) => el("span", { class: "mh-top", role: "columnheader" }, String(head)))),
  ...cells.map((row, l) => el("div", { role: "row", class: "mh-row" }, el("span", { class: "mh-edge", role: "rowheader" }, String(data.layers[l])), row)));
  function render() {
    const { values } = data.maps[state.map], known = values.flat().filter((value) => value != null), dark = manyheads.dark(root);
    const least = Math.min(...known), most = Math.max(...known), signed = least < 0;
    const part = (value) => (signed ? value / (Math.max(-least, most) || 1) : (value - least) / (most - least || 1));
    legend.replaceChildren(manyheads.legend(manyheads.number(signed ? -Math.max(-least, most) : least), manyheads.number(signed ? Math.max(-least, most) : most), signed));
    const room = cells[0][0].clientWidth > 38;
    cells.forEach((row, l) => row.forEach((cell, h) => {
      const value = values[l][h], rgb = manyheads.rgb(dark, value == null ? 0 : part(value));
      cell.style.background = value == null ? "none" : manyheads.css(rgb);
      cell.style.color = value == null ? "inherit" : manyheads.ink(rgb);
      cell.textContent = room ? manyheads.number(value) : "";
      cell.setAttribute("aria-label", `Layer ${data.layers[l]}, head ${data.heads[h]}: ${manyheads.number(value)}`);
    }));
    tell(null);
  }
  function tell(at) {
    const map = data.maps[state.map];
    told.textContent = at
      ? `${map.name}, layer ${data.layers[at[0]]}, head ${data.heads[at[1]]}: ${manyheads.number(map.values[at[0]][at[1]])}`
      : `${map.note || map.name}${opens ? " Press a cell to open its head." : ""}`;
  }
  const at = (event) => {
    const cell = event.target.closest(".mh-cell");
    return cell ? cell.dataset.at.split(",").map(Number) : null;
  };
  grid.addEventListener("pointerover", (event) => tell(at(event)));
  grid.addEventListener("pointerleave", () => tell(null));
  grid.addEventListener("focusin", (event) => tell(at(event)));
  grid.addEventListener("click", async (event) => {
    const place = at(event);
    if (!place) return;
    const what = { layer: data.layers[place[0]], head: data.heads[place[1]] };
    (await host.open("head", what)) || host.open("model", what);
  });
  grid.addEventListener("keydown", (event) => {
    const step = manyheads.step(event, 8);
    if (!step) return;
    cells[state.at[0]][state.at[1]].tabIndex = -1;
    state.at = [clamp(state.at[0] + step[0], 0, cells.length - 1), clamp(state.at[1] + step[1], 0, cells[0].length - 1)];
    const cell = cells[state.at[0]][state.at[1]];
    cell.tabIndex = 0;
    cell.focus();
  });
  manyheads.redraw(root, render);
  render();
};
