// Head table: a row per head, a column per score, sorted by any of them.
manyheads.views.table = function (root, data, host) {
  const { el } = manyheads;
  const state = { column: data.sort, down: true, layer: 0, shown: 100 };
  const opens = host.has("head") || host.has("model");
  const note = el("p", { class: "mh-note" }), body = el("tbody", {});
  const names = ["Layer", "Head", ...data.columns.map((column) => column.name)];
  const titles = names.map((name, i) => el("th", { scope: "col", class: "mh-num" },
    el("button", { type: "button", title: i > 1 ? data.columns[i - 2].note || "" : "", onclick: () => sort(i) }, name)));
  const more = el("button", { type: "button", class: "mh-quiet", onclick: () => { state.shown = Infinity; render(); } }, "Show all");
  const layers = [...new Set(data.rows.map((row) => row[0]))];
  root.append(el("div", { class: "mh-controls" }, manyheads.select("Layer", ["All", ...layers], (place) => { state.layer = place; render(); })),
    note, el("div", { class: "mh-wide" }, el("table", { class: "mh-table" }, el("thead", {}, el("tr", {}, titles)), body)), more);
  const spans = names.map((_, i) => data.rows.reduce((most, row) => Math.max(most, Math.abs(row[i] || 0)), 0));
  function sort(column) {
    state.down = state.column === column ? !state.down : column > 1;
    state.column = column;
    render();
  }
  function render() {
    const { column, down } = state, kept = data.rows.filter((row) => !state.layer || row[0] === layers[state.layer - 1]);
    // Heads without a value come last either way; equal ones stay in the order of layers and heads.
    kept.sort((a, b) => {
      if (a[column] == null || b[column] == null) return (a[column] == null) - (b[column] == null);
      return (down ? b[column] - a[column] : a[column] - b[column]) || a[0] - b[0] || a[1] - b[1];
    });
    titles.forEach((title, i) => {
      if (i === column) title.setAttribute("aria-sort", down ? "descending" : "ascending");
      else title.removeAttribute("aria-sort");
    });
    body.replaceChildren(...kept.slice(0, state.shown).map((row) => el("tr", {}, row.map((value, i) => {
      const cell = el("td", { class: "mh-num" });
      if (i === 1 && opens) {
        cell.append(el("button", { type: "button", class: "mh-go", "aria-label": `Open layer ${row[0]}, head ${row[1]}`, onclick: async () => {
          const what = { layer: row[0], head: row[1] };
          (await host.open("head", what)) || host.open("model", what);
        } }, String(value)));
      } else cell.append(manyheads.number(value));
      if (i > 1) {
        cell.classList.add(value < 0 ? "mh-below" : "mh-bar");
        cell.style.setProperty("--part", `${spans[i] ? (100 * Math.abs(value || 0)) / spans[i] : 0}%`);
      }
      return cell;
    }))));
    more.hidden = kept.length <= state.shown;
    note.textContent = `${kept.length} heads. Press a title to sort${opens ? ", a head's number to open it" : ""}.`;
  }
  render();
};
