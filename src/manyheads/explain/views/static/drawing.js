// A drawing over its steps: the picture, what it is taken to become, and the patches that look at each word.
manyheads.views.drawing = function (root, data, host) {
  const { el } = manyheads, steps = data.times.length, [rows, columns] = data.grid, patches = rows * columns;
  const bytes = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const pictures = bytes(data.pictures), guesses = bytes(data.guesses), maps = bytes(data.maps);
  const state = { layer: -1, head: -1, step: Math.floor(steps / 5) };
  const [height, width, channels] = data.size, zoom = 5 * Math.max(1, Math.round(32 / Math.max(height, width)));
  const told = el("p", { class: "mh-caption", "aria-live": "polite" });
  const strip = el("div", { class: "mh-wide" }), large = el("div", { class: "mh-drawn" });
  const names = (what, count) => [`mean of all ${what}s`, ...Array.from({ length: count }, (_, i) => `${what} ${i}`)];
  const slider = el("input", { type: "range", min: 0, max: steps - 1, value: state.step, oninput: () => { state.step = Number(slider.value); render(); } });
  root.append(el("div", { class: "mh-controls" },
    manyheads.select("Layer", names("layer", data.layers), (place) => { state.layer = place - 1; render(); }),
    manyheads.select("Head", names("head", data.heads), (place) => { state.head = place - 1; render(); }),
    el("label", { class: "mh-field" }, el("span", {}, "Step"), slider)), told, large, strip);
  const all = (one, count) => (one < 0 ? Array.from({ length: count }, (_, i) => i) : [one]);
  // Mean weight of a word at every patch, over the layers and heads that are asked for.
  function heat(step, word) {
    const found = new Float64Array(patches), layers = all(state.layer, data.layers), heads = all(state.head, data.heads);
    for (const layer of layers) for (const head of heads) {
      const start = (((step * data.layers + layer) * data.heads + head) * data.words.length + word) * patches;
      for (let i = 0; i < patches; i++) found[i] += (maps[start + i] / 255) * data.most[word] / (layers.length * heads.length);
    }
    return found;
  }
  function canvas(tall, wide, side, label, paint) {
    const own = el("canvas", { class: "mh-tile", role: "img", "aria-label": label, title: label, width: wide, height: tall });
    own.style.width = `${side}px`;
    own.style.height = `${(side * tall) / wide}px`;
    const pen = own.getContext("2d"), image = pen.createImageData(wide, tall);
    for (let i = 0; i < tall * wide; i++) image.data.set([...paint(i), 255], 4 * i);
    pen.putImageData(image, 0, 0);
    return own;
  }
  function picture(from, step, side, label) {
    const at = step * height * width * channels;
    return canvas(height, width, side, label, (i) => [0, 1, 2].map((c) => from[at + i * channels + (channels > 1 ? c : 0)]));
  }
  function map(values, most, side, label) {
    const dark = manyheads.dark(root);
    return canvas(rows, columns, side, label, (i) => manyheads.rgb(dark, most ? values[i] / most : 0));
  }
  const line = (name, cells) => el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => el("td", {}, cell)));
  function render() {
    const every = Array.from({ length: steps }, (_, i) => i), small = 44;
    const grids = data.words.map((_, word) => every.map((step) => heat(step, word)));
    const tops = grids.map((own) => Math.max(...own.map((each) => Math.max(...each))));
    const now = state.step, big = Math.min(width * zoom, 160);
    large.replaceChildren(
      el("figure", {}, picture(pictures, steps, big, "the drawing"), el("figcaption", {}, "the drawing")),
      el("figure", {}, picture(guesses, now, big, `what step ${now} takes the end to be`), el("figcaption", {}, `guess at step ${now}`)),
      ...data.words.map((word, w) => el("figure", {}, map(grids[w][now], tops[w], big, `${word} at step ${now}`), el("figcaption", {}, `${word}: ${manyheads.number(grids[w][now].reduce((a, b) => a + b, 0) / patches)}`))));
    strip.replaceChildren(el("table", { class: "mh-strip" },
      el("thead", {}, el("tr", {}, el("th", {}, "step"), every.map((step) => el("th", { scope: "col" }, String(step))))),
      el("tbody", {},
        line("picture", every.map((step) => picture(pictures, step, small, `picture at step ${step}`))),
        line("guess", every.map((step) => picture(guesses, step, small, `what step ${step} takes the end to be`))),
        data.words.map((word, w) => line(word, every.map((step) => map(grids[w][step], tops[w], small, `${word} at step ${step}`)))))));
    told.textContent = "How much the patches of the picture attend to each word while it is drawn; every word is coloured up to its own greatest weight here. "
      + "The number below a word's map is its share of all attention at the step.";
  }
  manyheads.redraw(root, render);
  render();
};
