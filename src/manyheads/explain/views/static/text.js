// Attribution over text: each token in the colour of its value.
manyheads.views.text = function (root, data) {
  const { el, clamp } = manyheads;
  const state = { method: 0, at: 0, numbers: false };
  const told = el("p", { class: "mh-caption", "aria-live": "polite" });
  const text = el("div", { class: "mh-text", dir: "auto", role: "listbox", tabindex: "0", "aria-label": "Tokens with their values" });
  const body = el("tbody", {}), legend = el("span", {});
  const numbers = el("label", { class: "mh-field" }, el("input", { type: "checkbox", onchange: (event) => { state.numbers = event.target.checked; render(); } }), el("span", {}, "Values"));
  root.append(el("div", { class: "mh-controls" },
    data.methods.length > 1 ? manyheads.select("Method", data.methods.map((each) => each.name), (place) => { state.method = place; render(); }) : null,
    legend, numbers),
  told, text, el("h2", { class: "mh-space" }, "Strongest tokens"),
  el("table", { class: "mh-list mh-short" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Token"), el("th", { scope: "col", class: "mh-num" }, "Value"))), body));
  const values = () => data.methods[state.method].values;
  const items = data.tokens.map((token, i) => {
    const inked = token.trim() !== "" && manyheads.parts(token.trim()).every((part) => !part[1]);
    // Words keep their own spaces and their letters join across tokens; what cannot be seen gets its mark.
    return el("span", { class: "mh-word", role: "option", id: manyheads.id(), "data-index": i }, inked ? token : manyheads.token(token),
      el("span", { class: "mh-value" }), !inked && /\n/.test(token) ? el("br", {}) : null);
  });
  text.append(...items);
  function render() {
    const dark = manyheads.dark(root), all = values(), most = all.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    const signed = all.some((value) => value < 0);
    legend.replaceChildren(manyheads.legend(signed ? manyheads.number(-most) : "0", manyheads.number(most), signed));
    items.forEach((item, i) => {
      const rgb = manyheads.rgb(dark, most ? all[i] / most : 0);
      item.style.background = manyheads.css(rgb);
      item.style.color = manyheads.ink(rgb);
      const label = item.querySelector(".mh-value");
      label.textContent = state.numbers ? manyheads.number(all[i]) : "";
      item.setAttribute("aria-label", `${manyheads.plain(data.tokens[i])}: ${manyheads.number(all[i])}`);
    });
    const order = [...all.keys()].sort((a, b) => Math.abs(all[b]) - Math.abs(all[a])).slice(0, 10);
    body.replaceChildren(...order.map((i) => el("tr", {}, el("td", {}, el("button", { type: "button", class: "mh-go", onclick: () => at(i, true) },
      el("span", { class: "mh-index" }, String(i)), manyheads.token(data.tokens[i]))), el("td", { class: "mh-num" }, manyheads.number(all[i])))));
    tell();
  }
  const tell = () => {
    const all = values(), i = state.at;
    told.replaceChildren(el("span", { class: "mh-index" }, String(i)), manyheads.token(data.tokens[i]), `  ${manyheads.number(all[i])}`,
      all.length > 1 ? el("span", { class: "mh-soft" }, ` (${1 + all.filter((value) => Math.abs(value) > Math.abs(all[i])).length} of ${all.length} by size)`) : "");
  };
  function at(index, reveal) {
    items[state.at].setAttribute("aria-selected", "false");
    state.at = clamp(index, 0, items.length - 1);
    items[state.at].setAttribute("aria-selected", "true");
    text.setAttribute("aria-activedescendant", items[state.at].id);
    if (reveal) items[state.at].scrollIntoView({ block: "nearest" });
    tell();
  }
  text.addEventListener("pointerover", (event) => {
    const item = event.target.closest(".mh-word");
    if (item) at(Number(item.dataset.index));
  });
  text.addEventListener("keydown", (event) => {
    const step = manyheads.step(event);
    if (step) at(state.at + step[0] + step[1] * (getComputedStyle(text).direction === "rtl" ? -1 : 1), true);
  });
  manyheads.redraw(root, render);
  render();
};
