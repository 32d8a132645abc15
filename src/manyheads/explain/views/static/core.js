"use strict";
// What all views share: elements without markup, stores that open when looked at, colours, keys, tabs.
const manyheads = { views: {} };

manyheads.el = function (tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
};

let serial = 0;
manyheads.id = () => `mh-${(serial += 1)}`;

// Tokens as people can see them: what has no ink gets a mark, and no token turns the direction of its neighbours.
const INVISIBLE =
  /[\u0000-\u001f\u007f-\u009f]|^ +| +$|[\u00a0\u00ad\u200b\u200e\u200f\u2028-\u202f\u2060-\u2069\ufeff\ufffd]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
const MARKS = { "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\ufffd": "�", "\u007f": "␡" };
function mark(text) {
  if (text[0] === " ") return "·".repeat(text.length);
  const code = text.codePointAt(0);
  if (MARKS[text]) return MARKS[text];
  return code < 32 ? String.fromCharCode(0x2400 + code) : `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}
manyheads.parts = function (token) {
  if (token === "") return [["∅", true]];
  if (/^[\u200c\u200d]+$/.test(token)) return [[[...token].map(mark).join(""), true]];
  if (/^\p{M}/u.test(token)) token = "◌" + token;
  const parts = [];
  let last = 0;
  for (const found of token.matchAll(INVISIBLE)) {
    if (found.index > last) parts.push([token.slice(last, found.index), false]);
    parts.push([mark(found[0]), true]);
    last = found.index + found[0].length;
  }
  if (last < token.length) parts.push([token.slice(last), false]);
  return parts;
};
manyheads.plain = (token) => manyheads.parts(token).map((part) => part[0]).join("");
manyheads.token = function (token) {
  const parts = manyheads.parts(token);
  const inside = parts.map(([text, marked]) => (marked ? manyheads.el("span", { class: "mh-mark" }, text) : text));
  return manyheads.el("bdi", { class: "mh-token" }, inside);
};

manyheads.percent = function (share) {
  if (share >= 1) return "100%";
  return `${Math.min(99.9, Math.round(share * 1000) / 10).toFixed(1)}%`;
};
manyheads.number = function (value) {
  if (value == null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (Number.isInteger(value) && size < 1e6) return String(value);
  return size < 1e-3 || size >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
};

// Bytes by name: from the page's own elements, which may still be arriving, or from a widget.
manyheads.pageSource = function () {
  const waiting = () => new Promise((done) => setTimeout(done, 15));
  return async (name) => {
    let node = document.getElementById("mh:" + name);
    while (document.readyState === "loading" && !(node && node.nextSibling)) {
      await waiting();
      node = document.getElementById("mh:" + name);
    }
    if (!node) throw new Error(`The page has no ${name}`);
    const text = node.textContent;
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  };
};
manyheads.inflate = async function (bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};
manyheads.blob = async (host, name) => manyheads.inflate(await host.source(name));

// Attention weights, opened head by head. The layout of a chunk is told in chunks.py.
manyheads.Store = class {
  constructor(spec, host) {
    Object.assign(this, spec);
    this.host = host;
    this.open = new Map();
    this.bytes = 0;
  }
  // layer and head are places, not numbers.
  head(layer, head) {
    const name = `${this.key}/${layer}/${head}`;
    let found = this.open.get(name);
    if (found) this.open.delete(name);
    else {
      found = manyheads.blob(this.host, name).then((data) => {
        this.bytes += data.length;
        return new manyheads.Rows(data, this.n, this.m, this.kept[layer][head] > 0, this.signed);
      });
    }
    this.open.set(name, found);
    if (this.bytes > 96e6 && this.open.size > 64) {
      this.open.delete(this.open.keys().next().value);
      this.bytes *= 1 - 1 / this.open.size;
    }
    return found;
  }
  thumbs() {
    this.thumbed = this.thumbed || manyheads.blob(this.host, `${this.key}/thumbs`);
    return this.thumbed;
  }
};
manyheads.Rows = class {
  constructor(data, n, m, sparse, signed) {
    this.n = n;
    this.m = m;
    this.steps = signed ? 127 : 255;
    let place = 0;
    const take = (count, width) => {
      const found = new Uint32Array(count);
      for (let plane = 0; plane < width; plane++, place += count)
        for (let i = 0; i < count; i++) found[i] |= data[place + i] << (8 * plane);
      return found;
    };
    this.scale = Float64Array.from(take(n, 2), (code) => (code === 32768 ? 0 : Math.exp(((code << 16) >> 16) / 256)));
    this.share = Float32Array.from(take(n, 2), (code) => code / 1000);
    this.starts = new Uint32Array(n + 1);
    if (sparse) {
      const counts = take(n, 2);
      for (let i = 0; i < n; i++) this.starts[i + 1] = this.starts[i] + counts[i];
      this.columns = take(this.starts[n], m <= 65536 ? 2 : 4);
      for (let i = 0; i < n; i++)
        for (let e = this.starts[i] + 1; e < this.starts[i + 1]; e++) this.columns[e] += this.columns[e - 1];
    } else for (let i = 0; i <= n; i++) this.starts[i] = i * m;
    const codes = data.subarray(place);
    this.codes = signed ? new Int8Array(codes.buffer, codes.byteOffset, codes.length) : codes;
  }
  column(entry) {
    return this.columns ? this.columns[entry] : entry % this.m;
  }
  weight(row, entry) {
    const part = this.codes[entry] / this.steps;
    return this.scale[row] * part * Math.abs(part);
  }
  // see(column, weight) for a row's entries that are not 0.
  row(row, see) {
    for (let e = this.starts[row]; e < this.starts[row + 1]; e++)
      if (this.codes[e]) see(this.column(e), this.weight(row, e));
  }
  // see(row, weight) for all rows that look at a column.
  looking(column, see) {
    if (!this.columns) {
      for (let i = 0; i < this.n; i++)
        if (this.codes[i * this.m + column]) see(i, this.weight(i, i * this.m + column));
      return;
    }
    for (let i = 0; i < this.n; i++)
      for (let e = this.starts[i]; e < this.starts[i + 1] && this.columns[e] <= column; e++)
        if (this.columns[e] === column) see(i, this.weight(i, e));
  }
};

// Colours that stay apart for the colour-blind (after Okabe and Ito), and ramps that differ in lightness.
const HEADS = {
  light: ["#0072b2", "#c25a00", "#00805c", "#b0417f", "#2f8fd0", "#8a6a00", "#5c4bb5", "#4f5b66"],
  dark: ["#5ab4f0", "#f0a13a", "#3fd0a4", "#ee93c6", "#a3d4ff", "#e6d35c", "#b3a5ff", "#c3ccd4"],
};
const RAMP = {
  light: [[247, 249, 251], [120, 174, 214], [8, 58, 112]],
  dark: [[24, 30, 37], [38, 110, 164], [214, 238, 255]],
};
const BELOW = { light: [[247, 249, 251], [240, 163, 82], [138, 63, 0]], dark: [[24, 30, 37], [176, 98, 24], [255, 221, 178]] };
manyheads.dark = function (root) {
  const chosen = (root.closest("[data-theme]") || root).dataset.theme;
  return chosen === "dark" || (chosen !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
};
manyheads.headColour = (root, index) => HEADS[manyheads.dark(root) ? "dark" : "light"][index % 8];
function along(stops, part) {
  const place = Math.min(1, Math.max(0, part)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (place - low)));
}
// value from 0 to 1; below 0 in the other hue.
manyheads.rgb = (dark, value) => along((value < 0 ? BELOW : RAMP)[dark ? "dark" : "light"], Math.abs(value));
manyheads.ink = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#10151a" : "#ffffff");
manyheads.css = (rgb) => `rgb(${rgb[0]} ${rgb[1]} ${rgb[2]})`;

// A legend of the ramp with its ends named.
manyheads.legend = function (low, high, signed) {
  const kind = signed ? "mh-ramp mh-signed" : "mh-ramp";
  return manyheads.el("span", { class: "mh-legend" }, low, manyheads.el("span", { class: kind, "aria-hidden": "true" }), high);
};

manyheads.select = function (label, options, change, chosen) {
  const choice = manyheads.el("select", { "aria-label": label, onchange: () => change(choice.selectedIndex) });
  options.forEach((name) => choice.append(manyheads.el("option", {}, String(name))));
  choice.selectedIndex = chosen || 0;
  const node = manyheads.el("label", { class: "mh-field" }, manyheads.el("span", {}, label), choice);
  node.choice = choice;
  return node;
};
manyheads.live = () => manyheads.el("div", { class: "mh-live", "aria-live": "polite" });

// A canvas as sharp as the screen, w by h in CSS pixels.
manyheads.fit = function (canvas, w, h) {
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
    canvas.style.width = `${w}px`;
    canvas.style.height = `${h}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, w, h);
  return pen;
};
// Calls again when the place, the theme or the system's theme changes.
manyheads.redraw = function (root, draw) {
  let asked = 0;
  const soon = () => {
    cancelAnimationFrame(asked);
    // In a pane that is hidden there is no room to draw in; it is told when it is shown.
    asked = requestAnimationFrame(() => root.clientWidth && draw());
  };
  new ResizeObserver(soon).observe(root);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
  const themed = root.closest(".mh");
  if (themed) new MutationObserver(soon).observe(themed, { attributes: true, attributeFilter: ["data-theme"] });
  return soon;
};
// Arrow keys and their kin as steps: [down, right], or null.
manyheads.step = function (event, page) {
  const far = page || 10;
  const steps = {
    ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    PageUp: [-far, 0], PageDown: [far, 0], Home: [-Infinity, 0], End: [Infinity, 0],
  };
  if (event.ctrlKey || event.metaKey || event.altKey || !steps[event.key]) return null;
  event.preventDefault();
  return steps[event.key];
};
manyheads.clamp = (value, low, high) => Math.min(high, Math.max(low, value));

manyheads.mount = function (root, spec, source) {
  const { el } = manyheads;
  root.classList.add("mh");
  root.dataset.theme = spec.theme;
  const panes = spec.views.map(() => el("section", { class: "mh-pane", hidden: true }));
  const shown = [];
  const tabs = spec.views.map((view, i) =>
    el("button", { type: "button", role: "tab", id: manyheads.id(), onclick: () => show(i) }, view.title)
  );
  const host = {
    source,
    // Brings a view of that kind to the front, if there is one, and tells it what to open.
    async open(kind, what) {
      const place = spec.views.findIndex((view) => view.kind === kind);
      if (place < 0) return false;
      const view = show(place);
      if (view && view.open) view.open(what);
      return true;
    },
    has: (kind) => spec.views.some((view) => view.kind === kind),
  };
  function show(place) {
    panes.forEach((pane, i) => (pane.hidden = i !== place));
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === place));
      tab.tabIndex = i === place ? 0 : -1;
    });
    if (!shown[place]) {
      const { kind, data } = spec.views[place];
      try {
        shown[place] = manyheads.views[kind](panes[place], data, host) || {};
      } catch (error) {
        panes[place].append(el("p", { class: "mh-error", role: "alert" }, `This view could not be shown: ${error.message}`));
        throw error;
      }
    }
    return shown[place];
  }
  const themes = ["auto", "light", "dark"];
  const theme = el("button", {
    type: "button", class: "mh-quiet mh-theme",
    onclick: () => {
      root.dataset.theme = themes[(themes.indexOf(root.dataset.theme) + 1) % 3];
      theme.textContent = `Theme: ${root.dataset.theme}`;
    },
  }, `Theme: ${spec.theme}`);
  const heading = el("div", { class: "mh-head" }, el("h1", { dir: "auto" }, spec.title), theme);
  root.replaceChildren(heading);
  if (spec.note) root.append(el("p", { class: "mh-note", dir: "auto" }, spec.note));
  if (panes.length > 1) {
    const bar = el("div", { class: "mh-tabs", role: "tablist", "aria-label": "Views" }, tabs);
    bar.addEventListener("keydown", (event) => {
      const step = manyheads.step(event);
      if (!step) return;
      const now = tabs.findIndex((tab) => tab.tabIndex === 0);
      const next = Number.isFinite(step[0])
        ? (now + step[0] + step[1] + tabs.length) % tabs.length
        : step[0] < 0 ? 0 : tabs.length - 1;
      show(next);
      tabs[next].focus();
    });
    panes.forEach((pane, i) => {
      pane.id = manyheads.id();
      pane.setAttribute("role", "tabpanel");
      pane.setAttribute("aria-labelledby", tabs[i].id);
      tabs[i].setAttribute("aria-controls", pane.id);
    });
    root.append(bar);
  }
  root.append(...panes);
  show(0);
  return host;
};
manyheads.start = function () {
  const spec = JSON.parse(document.getElementById("mh-spec").textContent);
  manyheads.mount(document.getElementById("mh-page"), spec, manyheads.pageSource());
};
