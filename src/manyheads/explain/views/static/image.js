// Image overlay: heat of a grid of patches over the picture that it belongs to.
manyheads.views.image = function (root, data, host) {
  const { el, clamp } = manyheads;
  const state = { map: 0, strength: 0.6, at: null, picture: null };
  const told = el("p", { class: "mh-caption", "aria-live": "polite" }), legend = el("span", {});
  const canvas = el("canvas", { class: "mh-image", role: "application", tabindex: "0", "aria-label": "Patches of the image; arrow keys move" });
  const slider = el("input", { type: "range", min: 0, max: 100, value: 60, oninput: () => { state.strength = slider.value / 100; draw(); } });
  root.append(el("div", { class: "mh-controls" },
    data.maps.length > 1 ? manyheads.select("Map", data.maps.map((each) => each.name), (place) => { state.map = place; state.at = null; draw(); }) : null,
    el("label", { class: "mh-field" }, el("span", {}, "Strength"), slider), legend), told, canvas);
  const now = () => data.maps[state.map];
  function draw() {
    if (!state.picture) return;
    const { values } = now(), tall = values.length, wide = values[0].length, ratio = data.height / data.width;
    const w = Math.min(root.clientWidth - 4, 560, 560 / ratio), h = w * ratio;
    const pen = manyheads.fit(canvas, w, h), most = values.flat().reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    pen.imageSmoothingEnabled = data.width > w;
    pen.drawImage(state.picture, 0, 0, w, h);
    // Heat is laid on by its strength, the same in dark and light: the picture is its ground.
    values.forEach((row, i) => row.forEach((value, j) => {
      const part = most ? value / most : 0;
      pen.fillStyle = part < 0 ? "#2f8fd0" : "#ff8c1a";
      pen.globalAlpha = state.strength * Math.abs(part);
      pen.fillRect((j * w) / wide, (i * h) / tall, w / wide + 0.3, h / tall + 0.3);
    }));
    pen.globalAlpha = 1;
    if (state.at) {
      const [i, j] = state.at, box = [(j * w) / wide, (i * h) / tall, w / wide, h / tall];
      for (const [colour, line] of [["#000", 4], ["#fff", 2]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = line;
        pen.strokeRect(...box);
      }
    }
    const signed = values.some((row) => row.some((value) => value < 0));
    legend.replaceChildren(el("span", { class: "mh-legend" }, signed ? [manyheads.number(-most), el("span", { class: "mh-ramp mh-heat mh-signed" })] : ["0", el("span", { class: "mh-ramp mh-heat" })], manyheads.number(most)));
    told.textContent = state.at
      ? `Patch in row ${state.at[0]}, column ${state.at[1]}: ${manyheads.number(values[state.at[0]][state.at[1]])}`
      : `${tall} × ${wide} patches. Point at one, or use the arrow keys.`;
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), { values } = now();
    const part = (value, size, count) => clamp(Math.floor((value / size) * count), 0, count - 1);
    state.at = [part(event.clientY - box.top, box.height, values.length), part(event.clientX - box.left, box.width, values[0].length)];
    draw();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = manyheads.step(event), { values } = now();
    if (!step) return;
    const [i, j] = state.at || [0, -step[1]];
    state.at = [clamp(i + step[0], 0, values.length - 1), clamp(j + step[1], 0, values[0].length - 1)];
    draw();
  });
  manyheads.redraw(root, draw);
  manyheads.blob(host, data.image).then((bytes) => {
    const picture = el("canvas", { width: data.width, height: data.height }), pen = picture.getContext("2d");
    const image = pen.createImageData(data.width, data.height);
    for (let i = 0; i < data.width * data.height; i++) {
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes[3 * i + c];
      image.data[4 * i + 3] = 255;
    }
    pen.putImageData(image, 0, 0);
    state.picture = picture;
    draw();
    root.dispatchEvent(new CustomEvent("mh-ready", { bubbles: true }));
  });
};
