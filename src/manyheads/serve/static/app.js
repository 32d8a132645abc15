// The app: a text, and what is asked of it. What the model and its owner wrote is put on the page as text only.
(function () {
  const { el, clamp } = manyheads;
  const facts = JSON.parse(document.getElementById("mh-facts").textContent);
  const root = document.getElementById("mh-page");

  async function ask(path, body) {
    const options = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {
      throw new Error("The app does not answer: has it been ended in its terminal?");
    }
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(found.error || `The app answered ${answer.status}`);
    return found;
  }

  // A button that starts a job, its progress, and a way to give it up. done(job) when it has ended well.
  function runner(name, path, body, done) {
    const go = el("button", { type: "submit", class: "ms-go" }, name);
    const bar = el("progress", { max: "1", "aria-label": "Progress" }), told = el("span", { role: "status" });
    const stop = el("button", { type: "button", onclick: () => job && ask(`/api/jobs/${job}/cancel`, {}).catch(tell) }, "Cancel");
    const error = el("p", { class: "mh-error", role: "alert", hidden: true, dir: "auto" });
    const running = el("span", { class: "ms-run", hidden: true }, bar, stop);
    let job = null, busy = false, again = false;
    const tell = (problem) => {
      error.hidden = false;
      error.textContent = problem.message;
    };
    // Asked for once more while it runs, it is given up and begun anew.
    async function run() {
      if (busy) {
        again = true;
        if (job) ask(`/api/jobs/${job}/cancel`, {}).catch(tell);
        return null;
      }
      error.hidden = true;
      let asked;
      try {
        asked = body();
      } catch (problem) {
        return tell(problem);
      }
      busy = go.disabled = true;
      running.hidden = false;
      bar.removeAttribute("value");
      told.textContent = "asking";
      try {
        let now = await ask(path, asked);
        job = now.id;
        while (now.state === "waiting" || now.state === "running") {
          await new Promise((go) => setTimeout(go, 200));
          now = await ask(`/api/jobs/${job}`);
          if (now.share) bar.value = now.share;
          told.textContent = now.state === "waiting" ? `waiting, ${now.ahead} in the queue` : now.step;
        }
        if (now.state === "failed") throw new Error(now.error);
        told.textContent = now.state;
        if (now.state === "done") done(now);
      } catch (problem) {
        told.textContent = "";
        tell(problem);
      } finally {
        job = null;
        busy = go.disabled = false;
        running.hidden = true;
      }
      if (again) {
        again = false;
        return run();
      }
      return null;
    }
    return { node: el("div", {}, el("div", { class: "ms-row" }, go, running, told), error), run };
  }
  const form = (run, ...fields) =>
    el("form", { class: "ms-form", onsubmit: (event) => { event.preventDefault(); run(); } }, fields);
  const field = (name, input) => el("label", { class: "mh-field" }, el("span", {}, name), input);
  const entry = (hint) => el("input", { type: "text", placeholder: hint, autocomplete: "off", spellcheck: "false", maxlength: "200", dir: "auto" });
  // A page in a corner of its own.
  const frame = (place, title, low) => [
    el("p", {}, el("a", { href: place, target: "_blank", rel: "noopener" }, "Open alone")),
    el("iframe", { src: place, title, sandbox: "allow-scripts", class: low ? "ms-frame ms-low" : "ms-frame" }),
  ];

  // The text, and its tokens as soon as they are known.
  const area = el("textarea", { rows: "3", dir: "auto", spellcheck: "false", maxlength: "200000" });
  const count = el("p", { class: "mh-note", role: "status" });
  const followers = [];
  let tokens = [], typed = 0;
  area.value = facts.begin;
  if (facts.words) area.placeholder = `The model knows the words ${facts.words.join(" ")}.`;
  area.addEventListener("input", () => {
    clearTimeout(typed);
    typed = setTimeout(read, 250);
  });
  async function read() {
    const text = area.value;
    let found = [], told = "Type some words.";
    if (text.trim()) {
      try {
        found = (await ask("/api/tokens", { text })).tokens;
        told = `${found.length.toLocaleString("en")} tokens${facts.positions ? ` of at most ${facts.positions.toLocaleString("en")}` : ""}`;
      } catch (problem) {
        told = problem.message;
      }
    }
    if (text !== area.value) return;
    tokens = found;
    count.textContent = told;
    followers.forEach((each) => each());
  }

  function layersOf(text) {
    if (!text.trim()) return null;
    const found = new Set();
    for (const part of text.split(",")) {
      const [, first, last] = /^\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?$/.exec(part) || [];
      if (first === undefined) throw new Error("Layers: want numbers such as 0,3 or 2-5.");
      for (let i = Number(first); i <= Number(last ?? first); i++) found.add(i);
    }
    const wrong = [...found].find((layer) => layer >= facts.layers);
    if (wrong !== undefined) throw new Error(`Layers: the model has 0 to ${facts.layers - 1}; there is no ${wrong}.`);
    return [...found].sort((a, b) => a - b);
  }

  manyheads.views.explain = function (pane) {
    const target = entry("the model's own answer"), layers = entry(`all, or such as 0,2-${facts.layers - 1}`);
    const heads = el("input", { type: "checkbox", checked: true });
    const methods = facts.methods.map(({ name, chosen }) => [name, el("input", { type: "checkbox", checked: chosen })]);
    const result = el("div", { class: "ms-result" });
    const { node, run } = runner("Explain", "/api/explain", () => {
      const chosen = methods.filter(([, box]) => box.checked).map(([name]) => name);
      if (!chosen.length) throw new Error("Choose at least one method.");
      return { text: area.value, methods: chosen, layers: layersOf(layers.value), target: target.value || null, heads: heads.checked };
    }, (job) => {
      result.replaceChildren(...frame(`/pages/${job.id}`, "Explanation"));
      result.lastChild.scrollIntoView({ block: "nearest" });
    });
    pane.append(form(run,
      el("fieldset", {}, el("legend", {}, "Attribution methods"),
        el("div", { class: "ms-many" }, methods.map(([name, box]) => el("label", {}, box, name)))),
      el("div", { class: "ms-row" }, facts.answers ? field("Explain", target) : null, field("Layers", layers),
        facts.answers ? el("label", { class: "mh-field" }, heads, "Score all heads by detectors") : null),
      node), result);
  };

  // Tokens from the first pressed to the last pressed.
  function spanPicker() {
    let span = null, at = 0, items = [];
    const list = el("div", { class: "ms-span", role: "listbox", tabindex: "0", dir: "auto", "aria-label": "Tokens of the span", "aria-multiselectable": "true" });
    const told = el("p", { class: "mh-note", role: "status" });
    function show() {
      items.forEach((item, i) => {
        item.setAttribute("aria-selected", String(Boolean(span) && i >= span[0] && i < span[1]));
        item.classList.toggle("ms-at", i === at);
      });
      if (items[at]) list.setAttribute("aria-activedescendant", items[at].id);
      told.textContent = span ? `Tokens ${span[0]} to ${span[1] - 1}. Press another to begin anew.` : "Press the first and the last token of the span.";
    }
    function press(i) {
      at = i;
      const one = span && span[1] - span[0] === 1 && span[0] !== i;
      span = one ? [Math.min(span[0], i), Math.max(span[1], i + 1)] : [i, i + 1];
      show();
    }
    function fill() {
      span = null;
      at = 0;
      items = tokens.map((token) => el("span", { role: "option", id: manyheads.id() }, manyheads.token(token)));
      list.replaceChildren(...items);
      show();
    }
    list.addEventListener("click", (event) => {
      const i = items.findIndex((item) => item.contains(event.target));
      if (i >= 0) press(i);
    });
    list.addEventListener("keydown", (event) => {
      if (!items.length) return;
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        press(at);
      }
      const step = manyheads.step(event);
      if (!step) return;
      at = clamp(at + step[0] + step[1] * (getComputedStyle(list).direction === "rtl" ? -1 : 1), 0, items.length - 1);
      show();
      items[at].scrollIntoView({ block: "nearest" });
    });
    followers.push(fill);
    fill();
    return { node: el("fieldset", {}, el("legend", {}, "Span"), list, told), value: () => span };
  }

  function headPicker() {
    const told = el("p", { class: "mh-note", role: "status" });
    const grid = el("div", { class: "ms-heads", role: "group", "aria-label": "Heads" });
    grid.style.setProperty("--heads", facts.heads);
    let at = [0, 0], needed = false;
    const rows = Array.from({ length: facts.layers }, (_, layer) => Array.from({ length: facts.heads }, (_, head) =>
      el("button", { type: "button", "aria-pressed": "false", tabindex: layer + head ? "-1" : "0", "aria-label": `Layer ${layer}, head ${head}`, onclick: (event) => { flip([event.currentTarget]); at = [layer, head]; } }, String(head))));
    const pressed = (button) => button.getAttribute("aria-pressed") === "true";
    function flip(buttons) {
      const to = !buttons.every(pressed);
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(to)));
      tell();
    }
    function value() {
      const found = [];
      rows.forEach((row, layer) => row.forEach((button, head) => pressed(button) && found.push([layer, head])));
      return found;
    }
    const tell = () => {
      const n = value().length;
      told.textContent = n ? `${n} of ${facts.layers * facts.heads} heads` : needed ? "Choose at least one head; a layer's name takes all of its heads." : "None chosen means all heads.";
    };
    rows.forEach((row, layer) => grid.append(el("button", { type: "button", class: "ms-layer", tabindex: "-1", "aria-label": `All heads of layer ${layer}`, onclick: () => flip(row) }, `L${layer}`), ...row));
    grid.addEventListener("keydown", (event) => {
      const step = manyheads.step(event);
      if (!step) return;
      rows[at[0]][at[1]].tabIndex = -1;
      at = [clamp(at[0] + step[0], 0, facts.layers - 1), clamp(at[1] + step[1], 0, facts.heads - 1)];
      rows[at[0]][at[1]].tabIndex = 0;
      rows[at[0]][at[1]].focus();
    });
    return { node: el("fieldset", {}, el("legend", {}, "Heads"), grid, told), value, need: (is) => { needed = is; tell(); } };
  }

  function answers(told) {
    const most = Math.max(...told.answers.flatMap((row) => [row.before, row.after]), 1e-9);
    const percent = (share) => (share < 5e-5 ? "<0.01%" : `${(100 * share).toFixed(2)}%`);
    const cell = (share) => {
      const node = el("td", { class: "mh-num mh-bar" }, percent(share));
      node.style.setProperty("--part", `${(100 * share) / most}%`);
      return node;
    };
    const signed = (points) => (Math.abs(points) < 5e-5 ? "0" : `${points > 0 ? "+" : "−"}${Math.abs(100 * points).toFixed(2)}`);
    const rows = told.answers.map((row) => el("tr", { class: row.name === told.target ? "ms-target" : null },
      el("td", { class: "ms-name" }, manyheads.token(row.name)), cell(row.before), cell(row.after),
      el("td", { class: "mh-num" }, signed(row.after - row.before))));
    const head = ["Answer", "Before", "After", "Points"].map((name, i) => el("th", { scope: "col", class: i ? "mh-num" : "ms-name" }, name));
    const said = told.same ? "Nothing changed: the probabilities are exactly the same."
      : `${percent(told.moved)} of the probability moved to other answers.`;
    return [el("h2", {}, "Answers before and after"), el("p", { class: "ms-moved", role: "status" }, said),
      el("div", { class: "ms-answers", tabindex: "0", role: "region", "aria-label": "Answers before and after" },
        el("table", { class: "mh-table" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)))];
  }

  manyheads.views.change = function (pane) {
    let kind = facts.kinds[0];
    const says = el("p", { class: "mh-note" }), label = el("span", {});
    const slider = el("input", { type: "range", step: "0.05", "aria-label": "Strength by slider" });
    const number = el("input", { type: "number", step: "any", required: true });
    const target = entry("the model's own answer");
    const span = spanPicker(), heads = headPicker(), result = el("div", { class: "ms-result" });
    let measure = facts.measures[0];
    slider.addEventListener("input", () => (number.value = slider.value));
    number.addEventListener("input", () => (slider.value = number.value));
    function turn(place) {
      kind = facts.kinds[place];
      says.textContent = `${kind.says} ${kind.neutral} changes nothing.`;
      label.textContent = kind.label;
      for (const input of [slider, number]) Object.assign(input, { min: kind.low, max: kind.high, value: kind.start });
      span.node.hidden = kind.needs !== "span";
      heads.need(kind.needs === "heads");
    }
    const { node, run } = runner("Intervene", "/api/intervene", () => {
      const chosen = heads.value(), own = kind.needs === "span" ? span.value() : null;
      if (kind.needs === "span" && !own) throw new Error("Choose the tokens of the span first.");
      if (kind.needs === "heads" && !chosen.length) throw new Error("Choose at least one head first.");
      return { text: area.value, kind: kind.name, factor: Number(number.value), span: own, heads: chosen.length ? chosen : null, target: target.value || null, measure };
    }, (job) => {
      result.replaceChildren(...answers(job.result), el("h2", { class: "mh-space" }, "Which tokens count, before and after"), ...frame(`/pages/${job.id}`, "Attribution before and after", true));
      result.querySelector(".ms-answers").scrollIntoView({ block: "nearest" });
    });
    pane.append(form(run,
      el("div", {}, el("div", { class: "ms-row" },
        manyheads.select("Intervention", facts.kinds.map((each) => each.title), turn),
        el("label", { class: "mh-field" }, label, number), slider), says),
      span.node, heads.node,
      el("div", { class: "ms-row" }, field("Answer", target), manyheads.select("Attribution", facts.measures, (place) => (measure = facts.measures[place]))),
      node), result);
    turn(0);
  };

  // A picture's levels [channels][rows][columns] from -1 to 1, or a word's map over patches up to its greatest weight.
  function tile(tall, wide, side, label, paint) {
    const own = el("canvas", { class: "mh-tile", role: "img", "aria-label": label, title: label, width: wide, height: tall });
    own.style.width = `${side}px`;
    own.style.height = `${(side * tall) / wide}px`;
    const pen = own.getContext("2d"), image = pen.createImageData(wide, tall);
    for (let i = 0; i < tall * wide; i++) image.data.set([...paint(i), 255], 4 * i);
    pen.putImageData(image, 0, 0);
    return own;
  }
  function picture(levels, label) {
    const tall = levels[0].length, wide = levels[0][0].length;
    return tile(tall, wide, 168, label, (i) => [0, 1, 2].map((c) => 127.5 * (1 + clamp((levels[c] || levels[0])[Math.floor(i / wide)][i % wide], -1, 1))));
  }
  function wordMap(own, side) {
    const most = Math.max(...own.maps.without, ...own.maps.with), wide = Math.sqrt(own.maps[side].length), dark = manyheads.dark(root);
    return tile(wide, wide, 84, `${own.word}, ${side}`, (i) => manyheads.rgb(dark, most ? own.maps[side][i] / most : 0));
  }
  const grid = (label, head, rows) => el("div", { class: "ms-answers", tabindex: "0", role: "region", "aria-label": label },
    el("table", { class: "mh-table ms-beside" },
      el("thead", {}, el("tr", {}, ["", ...head].map((name) => el("th", { scope: "col", class: "ms-name" }, name)))),
      el("tbody", {}, rows.map(([name, cells]) => el("tr", {}, el("th", { scope: "row", class: "ms-name", dir: "auto" }, name), cells.map((cell) => el("td", { class: "ms-name" }, cell)))))));
  const sides = ["without", "with"];
  function steered(told) {
    const said = el("ul", { class: "ms-said" }, told.headline.map((line) => el("li", { dir: "auto" }, line)));
    const share = (value) => `${(100 * value).toFixed(2)}%`;
    if (told.pictures) return [el("h2", {}, "Without and with"),
      grid("Drawings", sides, told.captions.map((caption, i) => [caption, sides.map((side) => picture(told.pictures[side][i], `${caption}, ${side}`))])), said,
      el("h2", { class: "mh-space" }, "Where each word is looked at"),
      grid("Word maps", told.words.map((own) => own.word), sides.map((side) => [side, told.words.map((own) => wordMap(own, side))]))];
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
    return [el("h2", {}, "Without and with"),
      grid("Answers", sides, [["answer", sides.map((side) => el("pre", { class: "ms-told", dir: "auto" }, told.answers[side]))]]), said,
      el("h2", { class: "mh-space" }, "Next token"),
      grid("Next token", sides, told.next.map((row) => [manyheads.token(row.token), sides.map((side) => share(row[side]))])),
      el("h2", { class: "mh-space" }, "Attention of the last place, on average over layers"),
      grid("Attention", sides, Object.entries(told.attention).map(([name, own]) => [name, sides.map((side) => share(mean(own[side])))]))];
  }

  manyheads.views.steer = function (pane) {
    const offered = facts.steer, drawing = offered.kind === "diffusion", reads = offered.kind === "vision-language";
    let chosen = null, fields = [], image = null, typed = 0;
    const says = el("p", { class: "mh-note" }), label = el("span", {}), places = el("div", { class: "ms-row ms-places" });
    const slider = el("input", { type: "range", "aria-label": "Strength by slider" }), tick = el("i", { class: "ms-tick", "aria-hidden": "true" });
    const number = el("input", { type: "number", step: "any" }), neutral = el("button", { type: "button" });
    const strength = el("div", { class: "ms-row" }, el("label", { class: "mh-field" }, label, number), el("span", { class: "ms-slide" }, slider, tick), neutral);
    const live = el("input", { type: "checkbox", checked: true });
    const marks = el("textarea", { rows: "2", dir: "auto", spellcheck: "false", maxlength: "4000", placeholder: "such as: 40718" });
    const steps = el("input", { type: "number", min: "1", max: "40", value: "20" }), seed = el("input", { type: "number", min: "0", value: "0" });
    const file = el("input", { type: "file", accept: "image/*" }), shown = el("p", { class: "mh-note", role: "status" });
    const pictured = el("div", { class: "ms-row" }, field(drawing ? "Reference picture, if any" : "Picture", file), shown);
    const result = el("div", { class: "ms-result" });
    file.addEventListener("change", () => {
      const own = file.files[0];
      image = null;
      shown.textContent = "";
      if (!own) return;
      if (own.size > 600000) {
        shown.textContent = "The picture's file is larger than 600 kB: choose a smaller one.";
        return;
      }
      const reader = new FileReader();
      reader.addEventListener("load", () => {
        image = reader.result.split(",")[1];
        again();
      });
      reader.readAsDataURL(own);
    });
    function again() {
      clearTimeout(typed);
      if (live.checked && result.firstChild) typed = setTimeout(run, 250);
    }
    slider.addEventListener("input", () => { number.value = slider.value; again(); });
    number.addEventListener("input", () => { slider.value = number.value; again(); });
    neutral.addEventListener("click", () => {
      for (const [name, value] of Object.entries(chosen.neutral)) {
        const own = fields.find(([each]) => each.name === name);
        if (name === chosen.strength) slider.value = number.value = value;
        else if (own) own[1].value = value;
      }
      again();
    });
    function turn(place) {
      chosen = offered.methods[place];
      const own = chosen.arguments.find((each) => each.name === chosen.strength);
      says.textContent = `${chosen.title[0].toUpperCase()}${chosen.title.slice(1)} (${chosen.source}). ${chosen.notes}`;
      strength.hidden = !chosen.reach;
      if (chosen.reach) {
        const [low, high] = chosen.reach, still = Number(chosen.neutral[chosen.strength]);
        label.textContent = own.name;
        Object.assign(slider, { min: low, max: high, step: own.whole ? 1 : (high - low) / 100, value: own.default ?? high });
        number.value = slider.value;
        tick.style.setProperty("--at", (still - low) / (high - low));
        tick.title = neutral.textContent = `Neutral: ${chosen.neutral[chosen.strength]}`;
      }
      fields = chosen.arguments.filter((each) => each !== own || !chosen.reach).map((each) => [each, entry(each.needed ? "must be given" : each.default ?? "by itself")]);
      fields.forEach(([, input]) => { input.maxLength = 2000; });
      places.replaceChildren(...fields.map(([each, input]) => field(each.name, input)));
      pictured.hidden = !(reads || chosen.picture);
      result.replaceChildren();
    }
    const { node, run } = runner("Run without and with", "/api/steer", () => {
      const given = Object.fromEntries(fields.filter(([, input]) => input.value.trim()).map(([each, input]) => [each.name, input.value.trim()]));
      if (chosen.reach) given[chosen.strength] = number.value;
      const asked = { text: area.value, name: chosen.name, arguments: given };
      if (drawing) Object.assign(asked, { steps: Number(steps.value), seed: Number(seed.value) });
      else asked.marks = marks.value.split("\n").filter((line) => line.trim());
      if (image && !pictured.hidden) asked.image = image;
      return asked;
    }, (job) => result.replaceChildren(...steered(job.result)));
    pane.append(form(run,
      el("div", {}, manyheads.select("Intervention", offered.methods.map((each) => each.name), turn), says),
      strength, places,
      drawing ? el("div", { class: "ms-row" }, field("Steps", steps), field("Seed", seed)) : el("label", { class: "ms-marks" }, el("span", {}, "Words of the text to mark, a line each (what span=text means)"), marks),
      pictured,
      el("label", { class: "mh-field" }, live, "Run again while the slider moves"),
      node), result);
    turn(0);
  };

  manyheads.views.reports = function (pane) {
    const body = el("tbody", {}), told = el("p", { class: "mh-note", role: "status" }), result = el("div", { class: "ms-result" });
    pane.classList.add("ms-reports");
    const size = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
    const open = (name) => result.replaceChildren(el("h2", { dir: "auto" }, name), ...frame(`/reports/${name.split("/").map(encodeURIComponent).join("/")}`, name));
    async function fill() {
      try {
        const found = await ask("/api/reports");
        told.textContent = found.length ? `${found.length} reports, the newest first.` : "No report.html, explain.html or study.html was found.";
        body.replaceChildren(...found.map((each) => el("tr", {}, el("td", { class: "ms-name" }, each.kind),
          el("td", { class: "ms-name" }, el("button", { type: "button", class: "mh-go", onclick: () => open(each.name) }, el("bdi", {}, each.name))),
          el("td", { class: "mh-num" }, new Date(1000 * each.modified).toISOString().slice(0, 16).replace("T", " ")), el("td", { class: "mh-num" }, size(each.bytes)))));
      } catch (problem) {
        told.textContent = problem.message;
      }
    }
    const head = ["Kind", "Report", "Written (UTC)", "Size"].map((name, i) => el("th", { scope: "col", class: i > 1 ? "mh-num" : "ms-name" }, name));
    pane.append(el("div", { class: "ms-row" }, told, el("button", { type: "button", onclick: fill }, "Look again")),
      el("div", { class: "ms-answers ms-list" }, el("table", { class: "mh-table" }, el("thead", {}, el("tr", {}, head)), body)), result);
    fill();
  };

  const views = facts.methods.length ? [{ kind: "explain", title: "Explain" }] : [];
  if (facts.kinds.length) views.push({ kind: "change", title: "Intervene" });
  if (facts.steer) views.push({ kind: "steer", title: "Steer" });
  if (facts.reports) views.push({ kind: "reports", title: "Reports" });
  manyheads.mount(root, { title: facts.name, note: facts.words ? `What its ${facts.layers} layers of ${facts.heads} heads draw.` : `What its ${facts.layers} layers of ${facts.heads} heads do with a text.`, theme: "auto", views });
  // Pages in frames follow the system alone, so the app does too.
  root.querySelector(".mh-theme").remove();
  (root.querySelector(".mh-tabs") || root.querySelector(".mh-pane")).before(el("label", { class: "ms-text" }, el("span", {}, facts.words ? "Caption" : "Text"), area), count);
  read();
})();
