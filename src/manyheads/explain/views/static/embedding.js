// Joint embedding of queries and keys: every head a field of points, all drawn at once by WebGL.
manyheads.views.embedding = function (root, data, host) {
  const { el, clamp } = manyheads;
  const GAP = 1.12, count = data.positions.length, per = 2 * count, total = per * data.layers.length * data.heads.length;
  const state = { colour: "kind", camera: { x: 0, y: 0, zoom: 1 }, head: null, near: -1, ready: false, lines: "one" };
  const told = el("p", { class: "mh-caption", "aria-live": "polite" }), legend = el("span", { class: "mh-legend" });
  const canvas = el("canvas", { "aria-hidden": "true" }), over = el("canvas", { "aria-hidden": "true" });
  const box = el("div", { class: "mh-plane", role: "application", tabindex: "0",
    "aria-label": "Queries and keys of the heads; arrow keys move, plus and minus zoom, 0 shows all" }, canvas, over);
  const COLOURS = ["kind", "position", "token", "norm", "input"];
  const names = ["All heads"];
  data.layers.forEach((layer) => data.heads.forEach((head) => names.push(`Layer ${layer}, head ${head}`)));
  const headChoice = manyheads.select("Head", names, (place) => fitTo(place ? place - 1 : null));
  const press = (label, name, act) => el("button", { type: "button", class: "mh-quiet", "aria-label": name, onclick: act }, label);
  root.append(el("div", { class: "mh-controls" }, headChoice,
    manyheads.select("Lines", ["Of the point", "Of all queries of a head"], (place) => { state.lines = place ? "all" : "one"; draw(); }),
    manyheads.select("Colour", ["Query or key", "Position", "Token", "Norm", ...(data.inputs ? ["Input"] : [])], (place) => { state.colour = COLOURS[place]; paint(); }),
    el("span", { class: "mh-swatches" }, press("+", "Zoom in", () => zoom(1.5)), press("−", "Zoom out", () => zoom(1 / 1.5)), press("Fit", "Show all", () => fitTo(state.head))), legend),
  told, box);

  const gl = canvas.getContext("webgl2", { antialias: false, depth: false, stencil: false });
  const flat = gl ? null : canvas.getContext("2d");
  const places = new Float32Array(2 * total), colours = new Uint8Array(4 * total), norms = new Uint8Array(total);
  let program, uniforms, colourBuffer;
  function shader(kind, source) {
    const made = gl.createShader(kind);
    gl.shaderSource(made, source);
    gl.compileShader(made);
    if (!gl.getShaderParameter(made, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(made));
    return made;
  }
  function prepare() {
    program = gl.createProgram();
    gl.attachShader(program, shader(gl.VERTEX_SHADER, `#version 300 es
      precision mediump float; in vec2 place; in vec4 colour; uniform vec2 centre, stretch; uniform float size; uniform int per;
      out vec4 tint; flat out int query;
      void main() {
        vec2 at = (place - centre) * stretch;
        gl_Position = vec4(at.x, -at.y, 0.0, 1.0);
        gl_PointSize = size; tint = colour; query = gl_VertexID % per < per / 2 ? 1 : 0;
      }`));
    gl.attachShader(program, shader(gl.FRAGMENT_SHADER, `#version 300 es
      precision mediump float; uniform float size; in vec4 tint; flat in int query; out vec4 paint;
      void main() {
        vec2 at = abs(gl_PointCoord - 0.5);
        float out_by = (query == 1 ? length(at) : at.x + at.y) - 0.5;
        // The edge is softened here: of points, only that would need the whole picture in several samples.
        float ink = 0.85 * clamp(0.5 - out_by * size, 0.0, 1.0);
        paint = vec4(tint.rgb * ink, ink);
      }`));
    gl.linkProgram(program);
    gl.useProgram(program);
    uniforms = Object.fromEntries(["centre", "stretch", "size", "per"].map((name) => [name, gl.getUniformLocation(program, name)]));
    const bind = (name, values, size, kind, normal) => {
      const buffer = gl.createBuffer(), place = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, size, kind, normal, 0, 0);
      return buffer;
    };
    bind("place", places, 2, gl.FLOAT, false);
    colourBuffer = bind("colour", colours, 4, gl.UNSIGNED_BYTE, true);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }
  const hex = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const hash = (text) => [...text].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) >>> 0, 7) % 8;
  function paint() {
    if (!state.ready) return;
    const dark = manyheads.dark(root), sides = [0, 1].map((i) => hex(manyheads.headColour(root, i)));
    const ramp = Array.from({ length: 256 }, (_, i) => manyheads.rgb(dark, 0.3 + (0.7 * i) / 255));
    const kinds = Array.from({ length: 8 }, (_, i) => hex(manyheads.headColour(root, i))), ofToken = data.tokens.map((token) => kinds[hash(token)]);
    for (let i = 0; i < total; i++) {
      const place = i % count;
      const rgb = state.colour === "kind" ? sides[i % per < count ? 0 : 1]
        : state.colour === "position" ? ramp[Math.round((255 * place) / Math.max(1, count - 1))]
          : state.colour === "norm" ? ramp[norms[i]] : state.colour === "input" ? kinds[data.inputs[place] % 8] : ofToken[place];
      colours[4 * i] = rgb[0];
      colours[4 * i + 1] = rgb[1];
      colours[4 * i + 2] = rgb[2];
      colours[4 * i + 3] = 255;
    }
    if (gl) {
      gl.bindBuffer(gl.ARRAY_BUFFER, colourBuffer);
      gl.bufferSubData(gl.ARRAY_BUFFER, 0, colours);
    }
    const shape = (name, diamond, rgb) => {
      const dot = el("span", { class: diamond ? "mh-dot mh-diamond" : "mh-dot mh-disc" });
      dot.style.background = rgb ? manyheads.css(rgb) : "currentColor";
      return [dot, name];
    };
    const own = state.colour === "kind", ends = { position: ["first", "last"], norm: ["short", "long"] }[state.colour];
    legend.replaceChildren(...shape("query", false, own && sides[0]), ...shape("key", true, own && sides[1]), ...(ends ? [manyheads.legend(...ends)] : []));
    draw();
  }
  const size = () => {
    const wide = Math.max(260, root.clientWidth - 4);
    return [wide, Math.min(clamp(wide * 0.85, 280, 620), Math.max(280, window.innerHeight * 0.64))];
  };
  const scale = () => state.camera.zoom;
  // More is drawn than is seen, by this part of the sides. While a drag stays within it, the drawing itself is moved, so
  // that a pan is smooth however many points there are and however slow the machine is.
  const SPARE = 0.3;
  function draw() {
    if (!state.ready) return;
    const [seenWide, seenTall] = size();
    box.style.height = `${seenTall}px`;
    for (const layer of [canvas, over]) {
      layer.style.left = `${-SPARE * seenWide}px`;
      layer.style.top = `${-SPARE * seenTall}px`;
      layer.style.transform = "none";
    }
    state.drawn = { ...state.camera };
    const w = seenWide * (1 + 2 * SPARE), h = seenTall * (1 + 2 * SPARE), ratio = Math.min(2, window.devicePixelRatio || 1), { x, y, zoom: pixels } = state.camera;
    const dot = clamp(pixels / 70, 2, 9);
    if (gl) {
      if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
        canvas.width = Math.round(w * ratio);
        canvas.height = Math.round(h * ratio);
        canvas.style.width = `${w}px`;
        canvas.style.height = `${h}px`;
      }
      gl.viewport(0, 0, gl.drawingBufferWidth, gl.drawingBufferHeight);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT);
      gl.uniform2f(uniforms.centre, x, y);
      gl.uniform2f(uniforms.stretch, (2 * pixels) / w, (2 * pixels) / h);
      gl.uniform1f(uniforms.size, dot * ratio);
      gl.uniform1i(uniforms.per, per);
      gl.drawArrays(gl.POINTS, 0, total);
    } else plain(manyheads.fit(canvas, w, h), w, h, dot);
    frame();
  }
  let settling = 0;
  function pan(dx, dy) {
    state.camera.x -= dx / scale();
    state.camera.y -= dy / scale();
    const [w, h] = size(), { drawn, camera } = state;
    const x = (drawn.x - camera.x) * scale(), y = (drawn.y - camera.y) * scale();
    if (drawn.zoom !== camera.zoom || Math.abs(x) > SPARE * w || Math.abs(y) > SPARE * h) return soon();
    canvas.style.transform = over.style.transform = `translate(${x}px, ${y}px)`;
    clearTimeout(settling);
    settling = setTimeout(soon, 250);
  }
  // Without WebGL: the same points by the plain canvas, slower.
  function plain(pen, w, h, dot) {
    for (let i = 0; i < total; i++) {
      pen.fillStyle = `rgb(${colours[4 * i]} ${colours[4 * i + 1]} ${colours[4 * i + 2]})`;
      pen.fillRect((places[2 * i] - state.camera.x) * scale() + w / 2 - dot / 2, (places[2 * i + 1] - state.camera.y) * scale() + h / 2 - dot / 2, dot, dot);
    }
  }
  const screen = (px, py, w, h) => [(px - state.drawn.x) * scale() + w / 2, (py - state.drawn.y) * scale() + h / 2];
  // Lines from a query to the keys that it attends to most, the more ink the more attention.
  const each = data.each;
  let joined = null;
  const slot = (query, k) => (Math.floor(query / per) * count + (query % per)) * each + k;
  const keyOf = (query, k) => (joined ? joined[slot(query, k)] | (joined[slot(query, k) + (total / 2) * each] << 8) : -1);
  function line(pen, query, k, w, h) {
    if (!joined) return;
    const key = query - (query % per) + count + keyOf(query, k), weight = joined[slot(query, k) + total * each] / 255;
    const [ax, ay] = screen(places[2 * query], places[2 * query + 1], w, h), [bx, by] = screen(places[2 * key], places[2 * key + 1], w, h);
    pen.save();
    pen.strokeStyle = getComputedStyle(root).getPropertyValue("--ink");
    pen.globalAlpha = 0.08 + 0.85 * weight;
    pen.beginPath();
    pen.moveTo(ax, ay);
    pen.lineTo(bx, by);
    pen.stroke();
    pen.restore();
  }
  const lines = (pen, query, most, w, h) => {
    for (let k = 0; k < Math.min(most, each); k++) line(pen, query, k, w, h);
  };
  // Edges and names of the heads, and the point under the pointer.
  function frame() {
    const [w, h] = size().map((side) => side * (1 + 2 * SPARE)), pen = manyheads.fit(over, w, h);
    const look = getComputedStyle(root), edge = look.getPropertyValue("--edge"), soft = look.getPropertyValue("--soft"), side = scale();
    pen.strokeStyle = edge;
    pen.fillStyle = soft;
    pen.font = "12px system-ui, sans-serif";
    data.layers.forEach((layer, l) => data.heads.forEach((head, i) => {
      const [left, top] = screen(i * GAP, l * GAP, w, h);
      if (left > w || top > h || left + side < 0 || top + side < 0) return;
      pen.strokeRect(left - 2, top - 2, side + 4, side + 4);
      if (side > 52) pen.fillText(`${layer}.${head}`, left + 2, top + 11);
    }));
    if (state.lines === "all" && state.head != null) for (let i = 0; i < count; i++) lines(pen, state.head * per + i, 1, w, h);
    if (state.near < 0) return;
    const start = state.near - (state.near % per), at = state.near % per;
    if (at < count) lines(pen, state.near, each, w, h);
    else for (let i = 0; i < count; i++) for (let k = 0; k < each; k++) if (keyOf(start + i, k) === at - count) line(pen, start + i, k, w, h);
    const [px, py] = screen(places[2 * state.near], places[2 * state.near + 1], w, h);
    pen.strokeStyle = look.getPropertyValue("--ink");
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(px, py, 8, 0, 7);
    pen.stroke();
    pen.lineWidth = 1;
  }
  let asked = 0;
  const soon = () => {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(draw);
  };
  function fitTo(head) {
    const [w, h] = size(), many = data.heads.length;
    state.head = head;
    headChoice.choice.selectedIndex = head == null ? 0 : head + 1;
    const wide = head == null ? many * GAP : 1.06, tall = head == null ? data.layers.length * GAP : 1.06;
    const left = head == null ? 0 : (head % many) * GAP, top = head == null ? 0 : Math.floor(head / many) * GAP;
    state.camera = { x: left + wide / 2 - 0.04, y: top + tall / 2 - 0.04, zoom: Math.min(w / wide, h / tall) * 0.97 };
    state.near = -1;
    tell();
    draw();
  }
  function zoom(factor, px, py) {
    const [w, h] = size(), before = scale(), after = clamp(before * factor, 8, 60000);
    const dx = px == null ? 0 : px - w / 2, dy = py == null ? 0 : py - h / 2;
    state.camera.x += dx / before - dx / after;
    state.camera.y += dy / before - dy / after;
    state.camera.zoom = after;
    soon();
  }
  function nearest(px, py) {
    const [w, h] = size(), x = (px - w / 2) / scale() + state.camera.x, y = (py - h / 2) / scale() + state.camera.y;
    const column = Math.floor(x / GAP), row = Math.floor(y / GAP);
    if (column < 0 || row < 0 || column >= data.heads.length || row >= data.layers.length) return -1;
    const start = (row * data.heads.length + column) * per;
    let best = -1, least = (14 / scale()) ** 2;
    for (let i = start; i < start + per; i++) {
      const away = (places[2 * i] - x) ** 2 + (places[2 * i + 1] - y) ** 2;
      if (away < least) [best, least] = [i, away];
    }
    return best;
  }
  function tell() {
    const i = state.near;
    if (i < 0) {
      const share = state.head == null ? null : data.explained && data.explained[state.head];
      told.textContent = `${total.toLocaleString("en")} points, ${data.method}. ${share == null ? "" : `The two axes hold ${manyheads.percent(share)} of this head's variance. `}` +
        (data.sampled ? `${count} positions of ${data.sampled}. ` : "") + "Drag to move, scroll to zoom, point at a dot to name it.";
      return;
    }
    const head = Math.floor(i / per), place = i % count;
    told.replaceChildren(`Layer ${data.layers[Math.floor(head / data.heads.length)]}, head ${data.heads[head % data.heads.length]}: ${i % per < count ? "query" : "key"} of `,
      el("span", { class: "mh-index" }, String(data.positions[place])), manyheads.token(data.tokens[place]), `${data.inputs ? ` of input ${data.inputs[place] + 1}` : ""}, norm ${manyheads.number((norms[i] / 255) * data.norms[head])}`);
  }
  let dragged = null;
  box.addEventListener("pointerdown", (event) => {
    dragged = [event.clientX, event.clientY];
    box.setPointerCapture(event.pointerId);
  });
  box.addEventListener("pointerup", () => (dragged = null));
  box.addEventListener("pointercancel", () => (dragged = null));
  box.addEventListener("pointermove", (event) => {
    if (!state.ready) return;
    if (dragged) {
      pan(event.clientX - dragged[0], event.clientY - dragged[1]);
      dragged = [event.clientX, event.clientY];
      return;
    }
    const area = box.getBoundingClientRect(), near = nearest(event.clientX - area.left, event.clientY - area.top);
    if (near === state.near) return;
    state.near = near;
    tell();
    frame();
  });
  box.addEventListener("wheel", (event) => {
    event.preventDefault();
    const area = box.getBoundingClientRect();
    zoom(Math.exp(-clamp(event.deltaY, -120, 120) / 300), event.clientX - area.left, event.clientY - area.top);
  }, { passive: false });
  box.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") return zoom(1.3);
    if (event.key === "-") return zoom(1 / 1.3);
    if (event.key === "0") return fitTo(null);
    const step = manyheads.step(event, 1);
    if (!step || !Number.isFinite(step[0])) return;
    pan(-40 * step[1], -40 * step[0]);
  });
  manyheads.redraw(root, paint);
  Promise.all([manyheads.blob(host, data.points), manyheads.blob(host, data.lines)]).then(([bytes, held]) => {
    joined = held;
    const number = (plane, i) => (bytes[plane * total + i] | (bytes[(plane + 1) * total + i] << 8)) / 65535;
    for (let i = 0; i < total; i++) {
      const head = Math.floor(i / per);
      places[2 * i] = (head % data.heads.length) * GAP + number(0, i);
      places[2 * i + 1] = Math.floor(head / data.heads.length) * GAP + number(2, i);
      norms[i] = bytes[4 * total + i];
    }
    if (gl) prepare();
    state.ready = true;
    paint();
    fitTo(null);
    root.dispatchEvent(new CustomEvent("mh-ready", { bubbles: true }));
  });
};
