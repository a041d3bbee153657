"use strict";
// Draws the document that lies in this page. Figures are taken from it as they are; names go in as text, never as HTML.
(() => {
  const doc = JSON.parse(document.getElementById("document").textContent);
  const categories = doc.categories;
  const KIB = 1024, MIB = KIB * 1024, GIB = MIB * 1024;
  const state = { run: 0, point: 0, byTime: false };

  // --- building blocks -------------------------------------------------------------

  const byId = (id) => document.getElementById(id);

  function el(tag, attributes = {}, ...children) {
    const made = tag === "svg" || tag === "path" || tag === "title"
      ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "style") Object.assign(made.style, value);
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  const run = () => doc.runs[state.run];
  const share = (part, whole) => `${whole > 0 ? (100 * part) / whole : 0}%`;
  const fill = (key) => `var(--c-${key})`;
  const count = (n) => (n === null || n === undefined ? "–" : n.toLocaleString("en-US"));
  const layerName = (name) => name || "(the model)";

  /** One unit for the page: the largest figure is told in it with a whole part. */
  const largest = Math.max(...doc.runs.map((r) => r.peak.allocated_bytes));
  const [unit, unitName, decimals] =
    largest >= 4 * GIB ? [GIB, "GiB", 2] : largest >= 4 * MIB ? [MIB, "MiB", 1] : [KIB, "KiB", 1];

  function sizeText(bytes, sign = false) {
    if (bytes === null || bytes === undefined) return "–";
    const exact = byId("exact").checked;
    const text = exact ? count(Math.abs(bytes)) : (Math.abs(bytes) / unit).toFixed(decimals);
    const mark = bytes < 0 ? "−" : sign && bytes > 0 ? "+" : "";
    return Number(text.replaceAll(",", "")) === 0 ? text : mark + text;
  }
  /** With its unit: the page's, or a larger one for what is thousands of it. */
  function fullText(bytes) {
    if (bytes === null || bytes === undefined) return "–";
    if (byId("exact").checked) return `${count(bytes)} bytes`;
    return unit < GIB && bytes >= 10000 * unit ? `${(bytes / GIB).toFixed(2)} GiB` : `${sizeText(bytes)} ${unitName}`;
  }
  /** A figure: for people in the page's unit, for programs and on hovering to the byte. */
  const size = (bytes, full = false, sign = false) =>
    el("data", { value: bytes ?? "", title: bytes === null ? "not known" : `${count(bytes)} bytes`,
      class: bytes === 0 ? "zero" : null }, full ? fullText(bytes) : sizeText(bytes, sign));

  function letter(category) {
    return el("span", { class: "letter", "aria-hidden": "true",
      style: { background: fill(category.key), color: `var(--on-${category.key})` } }, category.letter);
  }
  /** A stacked bar; what it shows is in the table beside it. */
  function track(sizes, whole, extra = "") {
    const parts = categories.filter((c) => sizes[c.key] > 0);
    return el("div", { class: `track ${extra}`, "aria-hidden": "true" },
      ...parts.map((c) => el("i", { title: `${c.title} ${fullText(sizes[c.key])}`,
        style: { width: share(sizes[c.key], whole), background: fill(c.key) } })));
  }
  const cellNumber = (bytes, sign = false) => el("td", { class: "number" }, size(bytes, false, sign));
  const header = (text, kind = "") => el("th", { scope: "col", class: kind }, text);
  const sum = (sizes) => Object.values(sizes).reduce((a, b) => a + b, 0);
  const used = (...all) => categories.filter((c) => c.key === "unknown" || all.some((sizes) => sizes && sizes[c.key]));

  function section(id, title, about, ...children) {
    const box = byId(id);
    box.replaceChildren(el("h2", { id: `${id}-title` }, title), ...[about ? el("p", { class: "about" }, about) : null, ...children].filter(Boolean));
    box.hidden = false;
  }

  // --- sections --------------------------------------------------------------------

  function setupText(r) {
    if (r.kind === "imported") return r.report.config.model;
    const config = r.report.config, options = config.options;
    const on = (value) => (value === true ? "on" : value === false ? "off" : value);
    const told = ["dtype", "attention", "quantization", "lora", "checkpointing", "optimizer", "accumulation", "kv_cache"]
      .filter((name) => name in options).map((name) => `${name} ${on(options[name])}`);
    return [config.model, `batch ${config.batch_size} × ${config.seq_len} tokens`, ...told].join(" · ");
  }

  function summary() {
    const r = run(), report = r.report, peak = r.peak, now = r.now, place = report.environment;
    const many = doc.runs.length > 1
      ? el("label", {}, "run ", el("select", { id: "run", onchange: (e) => lookAt(Number(e.target.value)) },
          ...doc.runs.map((other, i) => el("option", { value: i, selected: i === state.run }, other.name)))) : null;
    const biggest = [...categories].sort((a, b) => peak.by_category[b.key] - peak.by_category[a.key])[0];
    const where = peak.module ? `, in ${peak.module}` : "";
    const figure = (name, bytes, note = "") =>
      el("div", {}, el("dt", {}, name), el("dd", {}, size(bytes, true), note ? el("small", {}, ` ${note}`) : ""));
    const trainable = report.trainable_parameters, parameters = report.parameters;
    byId("summary").replaceChildren(
      el("div", { class: "head" }, el("h1", { id: "title" }, r.name), many),
      el("p", { class: "setup" }, setupText(r)),
      el("p", { class: "setup" }, [place.device_name, place.driver ? `driver ${place.driver}` : null,
        place.packages.torch ? `torch ${place.packages.torch}` : null,
        place.packages.transformers ? `transformers ${place.packages.transformers}` : null,
        parameters ? `${count(parameters)} parameters, ${count(trainable)} trained` : null].filter(Boolean).join(" · ")),
      report.failure ? el("p", { class: "verdict failed", role: "alert" }, report.failure) : "",
      el("p", { class: "verdict" }, "The peak, ", el("b", {}, size(peak.allocated_bytes, true)),
        `, is in step ${peak.step}, ${peak.phase}${where}. Most of it is ${biggest.title}: `,
        size(peak.by_category[biggest.key], true), ` (${Math.round((100 * peak.by_category[biggest.key]) / peak.allocated_bytes)}\u00a0%).`),
      el("dl", { class: "figures" },
        figure("peak", peak.allocated_bytes),
        figure("now", now.allocated_bytes, `after step ${now.step}`),
        figure("reserved by the allocator", now.reserved_bytes),
        figure("not accounted for", peak.by_category.unknown),
        figure("capacity", now.device_total_bytes)),
      deviceBar(peak, now));
    document.title = `${r.name}: GPU memory`;
  }

  function deviceBar(peak, now) {
    const whole = now.device_total_bytes;
    if (!whole) return "";
    // A prediction has no device that was read, a CPU no caching allocator: what nobody measured is not free.
    const told = [now.context_bytes, now.nccl_bytes, now.others_bytes].filter((bytes) => bytes !== null);
    const cached = now.reserved_bytes === null ? null : Math.max(0, now.reserved_bytes - peak.allocated_bytes);
    const outside = told.length ? sum(told) : null;
    const rest = whole - peak.allocated_bytes - (cached ?? 0) - (outside ?? 0);
    const axis = Math.max(whole, whole - rest);
    const bar = track(peak.by_category, axis, "device");
    bar.append(el("i", { class: "cached", title: "cached", style: { width: share(cached ?? 0, axis) } }),
      el("i", { class: "outside", title: "outside torch", style: { width: share(outside ?? 0, axis) } }));
    const item = (name, bytes) => bytes === null ? "" : el("li", {}, `${name} `, el("b", {}, size(bytes, true)));
    return el("div", {}, bar, el("ul", { class: "legend", "aria-label": "The device at the peak" },
      item("at the peak", peak.allocated_bytes), item("cached", cached), item("context and others", outside),
      rest < 0 ? item("more than it has", -rest)
        : item(cached === null || outside === null ? "the rest" : "free", rest)));
  }

  function held() {
    const r = run(), peak = r.peak, now = r.now, whole = Math.max(peak.allocated_bytes, now.allocated_bytes);
    const one = (sizes, c) => track({ [c.key]: sizes[c.key] }, whole);
    const rows = used(now.by_category, peak.by_category).map((c) => el("tr", {},
      el("th", { scope: "row", title: c.meaning }, letter(c), c.title),
      cellNumber(now.by_category[c.key]), el("td", { class: "cell" }, one(now.by_category, c)),
      cellNumber(peak.by_category[c.key]), el("td", { class: "cell" }, one(peak.by_category, c))));
    section("held", "What holds it", `Now is after step ${now.step}; the peak is of step ${peak.step}. Both on one axis, in ${byId("exact").checked ? "bytes" : unitName}.`,
      el("table", { id: "held-table" }, el("caption", {}, "Bytes by category, now and at the peak"),
        el("thead", {}, el("tr", {}, header("category"), header("now", "number"), header(""), header("peak", "number"), header(""))),
        el("tbody", {}, ...rows, el("tr", { class: "sum" }, el("th", { scope: "row" }, "allocated"),
          cellNumber(now.allocated_bytes), el("td"), cellNumber(peak.allocated_bytes), el("td")))));
  }

  function compare() {
    if (doc.runs.length < 2) return;
    const peaks = doc.runs.map((r) => r.peak), first = peaks[0], whole = Math.max(...peaks.map((p) => p.allocated_bytes));
    const bars = doc.runs.map((r, i) => el("tr", { "aria-current": i === state.run ? "true" : null },
      el("th", { scope: "row" }, el("button", { type: "button", onclick: () => lookAt(i), "aria-pressed": String(i === state.run) }, r.name)),
      cellNumber(peaks[i].allocated_bytes), cellDifference(peaks[i].allocated_bytes - first.allocated_bytes, i),
      el("td", { class: "cell" }, track(peaks[i].by_category, whole)),
      el("td", {}, `${peaks[i].phase}, step ${peaks[i].step}`)));
    const rows = used(...peaks.map((p) => p.by_category)).map((c) => el("tr", {},
      el("th", { scope: "row", title: c.meaning }, letter(c), c.title),
      ...peaks.flatMap((p, i) => [cellNumber(p.by_category[c.key]), ...(i ? [cellDifference(p.by_category[c.key] - first.by_category[c.key], i)] : [])])));
    section("compare", `${doc.runs.length} runs at their peaks`, `Differences are to ${doc.runs[0].name}, the first. All bars share one axis.`,
      el("table", { id: "compare-bars" }, el("caption", {}, "Runs at their peaks"),
        el("thead", {}, el("tr", {}, header("run"), header("peak", "number"), header("difference", "number"), header(""), header("where"))),
        el("tbody", {}, ...bars)),
      el("details", { open: doc.runs.length <= 4 }, el("summary", {}, "by category"),
        el("div", { class: "scroll" }, el("table", { id: "compare-table" }, el("caption", {}, "Peaks by category"),
          el("thead", {}, el("tr", {}, header("category"), ...doc.runs.flatMap((r, i) => [header(r.name, "number"), ...(i ? [header("±", "number")] : [])]))),
          el("tbody", {}, ...rows, el("tr", { class: "sum" }, el("th", { scope: "row" }, "allocated"),
            ...peaks.flatMap((p, i) => [cellNumber(p.allocated_bytes), ...(i ? [cellDifference(p.allocated_bytes - first.allocated_bytes, i)] : [])])))))));
  }
  const cellDifference = (bytes, index) =>
    el("td", { class: `number ${bytes > 0 ? "more" : bytes < 0 ? "less" : ""}` }, index ? size(bytes, false, true) : "");

  function layers() {
    const peak = run().peak, named = Object.entries(peak.by_layer);
    const whole = Math.max(...named.map(([, sizes]) => sum(sizes)), 1);
    const rows = named.map(([name, sizes]) => el("tr", {}, el("th", { scope: "row", class: "name" }, layerName(name)),
      cellNumber(sum(sizes)), el("td", { class: "cell" }, track(sizes, whole)),
      el("td", {}, categories.filter((c) => sizes[c.key]).sort((a, b) => sizes[b.key] - sizes[a.key]).slice(0, 3)
        .map((c) => `${c.title} ${sizeText(sizes[c.key])}`).join(", "))));
    section("layers", "Layers at the peak", "In the model's order, every bar on one axis.",
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": "layers-title" },
        el("table", { id: "layers-table" }, el("caption", {}, "Bytes by layer at the peak"),
          el("thead", {}, el("tr", {}, header("layer"), header("held", "number"), header(""), header("most of it"))),
          el("tbody", {}, ...rows))));
  }

  function owners() {
    const peak = run().peak;
    const parts = categories.filter((c) => peak.by_owner[c.key]).map((c) => {
      const kinds = Object.entries(peak.by_owner[c.key]);
      return el("details", {}, el("summary", {}, letter(c), c.title, size(peak.by_category[c.key], true)),
        el("p", { class: "about" }, c.meaning),
        el("table", {}, el("caption", {}, `${c.title} by owner`), el("tbody", {}, ...kinds.map(([name, bytes]) =>
          el("tr", {}, el("th", { scope: "row", class: "name" }, layerName(name)), cellNumber(bytes))))));
    });
    section("owners", "Who owns it at the peak", "Repeated layers are summed: * stands for their numbers.", ...parts);
  }

  function blocks() {
    const found = run().peak.largest;
    const titles = Object.fromEntries(categories.map((c) => [c.key, c]));
    const rows = found.map((b) => el("tr", {}, cellNumber(b.bytes),
      el("td", {}, letter(titles[b.category]), titles[b.category].title), el("td", { class: "name" }, layerName(b.owner)),
      el("td", { class: "name" }, [b.dtype, b.shape.length ? `[${b.shape.join(", ")}]` : ""].filter(Boolean).join(" ") || "–"),
      el("td", { class: "name" }, b.operator || "–"), el("td", {}, b.made_in === "idle" ? "before the step" : b.made_in)));
    section("blocks", "Largest blocks at the peak", "", el("div", { class: "scroll" },
      el("table", { id: "blocks-table" }, el("caption", {}, "Largest blocks at the peak"),
        el("thead", {}, el("tr", {}, header("bytes", "number"), header("category"), header("owner"), header("tensor"), header("made by"), header("made in"))),
        el("tbody", {}, ...rows))));
  }

  function steps() {
    const told = run().report.steps;
    byId("steps").hidden = !told.length;
    if (!told.length) return;
    const whole = Math.max(...told.map((s) => s.peak_bytes ?? s.allocated_bytes ?? 0), 1);
    const rows = told.map((s) => el("tr", {}, el("th", { scope: "row", class: "number" }, count(s.step)),
      el("td", { class: "number" }, s.loss === null ? "–" : s.loss.toFixed(3)),
      el("td", { class: "number" }, s.seconds === null ? "–" : `${(1000 * s.seconds).toFixed(0)} ms`),
      cellNumber(s.allocated_bytes), cellNumber(s.peak_bytes), cellNumber(s.reserved_bytes),
      el("td", { class: "cell" }, el("div", { class: "track", "aria-hidden": "true" },
        el("i", { style: { width: share(s.peak_bytes ?? 0, whole), background: "var(--accent)" } })))));
    section("steps", "Steps", "Bars show the peak of each. After it: before the gradients are zeroed.", el("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": "steps-title" },
      el("table", { id: "steps-table" }, el("caption", {}, "Steps"), el("thead", {}, el("tr", {}, header("step", "number"), header("loss", "number"),
        header("time", "number"), header("after it", "number"), header("peak", "number"), header("reserved", "number"), header(""))),
        el("tbody", {}, ...rows))));
  }

  function log() {
    const told = run().events;
    byId("log").hidden = !told.length;
    if (!told.length) return;
    section("log", "Events", "", el("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": "log-title" },
      el("table", { id: "log-table" }, el("caption", {}, "Events"), el("thead", {}, el("tr", {}, header("time", "number"), header("event"), header(""))),
        el("tbody", {}, ...told.map((e) => el("tr", {}, el("td", { class: "number" }, `${e.time_s.toFixed(1)} s`),
          el("td", {}, e.kind.replaceAll("_", " ")), el("td", {}, e.text)))))));
  }

  // --- the oscilloscope ------------------------------------------------------------

  /** A prediction's clock counts allocations, and a snapshot may have none: neither tells how long anything took. */
  const timed = () => run().kind !== "predicted" && run().step.timeline.time_us.at(-1) > 0;
  const alongTime = () => state.byTime && timed();

  /** Where a point of the timeline is, 0 to 1. */
  function places(step) {
    const line = step.timeline, along = alongTime() ? line.time_us : line.event.map((event) => event + 1);
    const whole = Math.max(along[along.length - 1], 1);
    return along.map((at) => Math.min(1, Math.max(0, at / whole)));
  }

  function scope() {
    const r = run(), step = r.step, line = step.timeline, xs = places(step);
    const highest = Math.max(...line.allocated_bytes, 1), top = highest * 1.08;
    const svg = el("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", role: "img", "aria-label":
      `Bytes held along step ${step.step}, stacked by category; highest ${fullText(highest)} at event ${step.peak_event}` });
    const below = new Array(xs.length).fill(0), letters = [];
    for (const c of categories.filter((found) => line.by_category[found.key])) {
      const sizes = line.by_category[c.key], above = sizes.map((bytes, i) => below[i] + bytes);
      svg.append(el("path", { d: area(xs, below, above, top), style: { fill: fill(c.key) } }, el("title", {}, c.title)));
      const thick = sizes.indexOf(Math.max(...sizes));
      const spot = widest(sizes, xs, top);
      if (spot >= 0) letters.push(el("span", { class: "mark", "aria-hidden": "true", style: {
        left: share(xs[spot], 1), bottom: share((below[spot] + above[spot]) / 2, top), color: `var(--on-${c.key})`, transform: "translate(-50%, 50%)" } }, c.letter));
      above.forEach((bytes, i) => { below[i] = bytes; });
    }
    const peakPoint = line.allocated_bytes.indexOf(highest);
    const plot = el("div", { class: "plot", id: "plot" }, svg, ...ticks(top), ...letters,
      el("span", { class: "peak", "aria-hidden": "true", style: { left: `clamp(3em, ${share(xs[peakPoint], 1)}, calc(100% - 3em))`, bottom: share(highest, top), transform: "translateX(-50%)" } }, `peak ${fullText(highest)}`),
      el("div", { class: "cursor", id: "cursor", style: { display: "block" } }));
    const move = (event) => {
      const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
      let best = 0;
      xs.forEach((at, i) => { if (Math.abs(at - x) < Math.abs(xs[best] - x)) best = i; });
      setPoint(best);
    };
    plot.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse" || event.buttons) move(event); });
    plot.addEventListener("pointerdown", move);
    const mode = (text, byTime) => el("button", { type: "button", "aria-pressed": String(state.byTime === byTime),
      onclick: () => { state.byTime = byTime; scope(); } }, text);
    section("scope", `Step ${step.step}, allocation by allocation`, "",
      el("div", { class: "head" },
        el("p", { class: "about" }, `${step.ending === "aborted" ? "An error ended it. " : ""}${count(step.events)} allocations and frees. Move over it, or use the slider: arrow keys step, Home and End go to its ends.`),
        el("div", { class: "group" }, ...(timed() ? [mode("by event", false), mode("by time", true)] : []),
          el("button", { type: "button", id: "to-peak", onclick: () => setPoint(peakPoint) }, "to the peak"))),
      plot, ...phases(step),
      el("div", { class: "slide" }, el("input", { type: "range", id: "slider", min: 0, max: xs.length - 1, step: 1, value: state.point,
        "aria-label": "Cursor along the step", oninput: (e) => setPoint(Number(e.target.value)) })),
      el("p", { class: "where", id: "where" }), el("ul", { class: "at", id: "at" }));
    setPoint(Math.min(state.point, xs.length - 1));
  }

  /** The middle of the widest stretch over which a letter fits into an area; -1 where none does. */
  function widest(sizes, xs, top) {
    let best = -1, width = 0.018, begin = -1;
    for (let i = 0; i <= sizes.length; i++) {
      if (i < sizes.length && sizes[i] / top > 0.055) { if (begin < 0) begin = i; continue; }
      if (begin >= 0 && xs[i - 1] - xs[begin] > width) {
        width = xs[i - 1] - xs[begin];
        const middle = (xs[i - 1] + xs[begin]) / 2;
        best = begin;
        for (let j = begin; j < i; j++) if (Math.abs(xs[j] - middle) < Math.abs(xs[best] - middle)) best = j;
      }
      begin = -1;
    }
    return best;
  }

  /** What is held stays so until the next event: steps, not slopes. */
  function area(xs, below, above, top) {
    const x = (i) => (1000 * xs[i]).toFixed(1), y = (bytes) => (1000 - (1000 * bytes) / top).toFixed(1);
    let there = `M${x(0)} ${y(above[0])}`, back = "";
    for (let i = 1; i < xs.length; i++) there += `H${x(i)}V${y(above[i])}`;
    for (let i = xs.length - 1; i > 0; i--) back += `V${y(below[i])}H${x(i)}V${y(below[i - 1])}`;
    return `${there}${back}H${x(0)}Z`;
  }

  function ticks(top) {
    const rough = top / 4, base = unit * 10 ** Math.floor(Math.log10(rough / unit));
    const step = [1, 2, 5, 10].map((n) => n * base).find((n) => n >= rough) ?? 10 * base;
    const made = [];
    for (let at = 0; at < top; at += step) {
      const text = Number((at / unit).toPrecision(4));
      made.push(el("div", { class: "grid", "aria-hidden": "true", style: { bottom: share(at, top) } }, el("span", {}, at ? `${text} ${unitName}` : "0")));
    }
    return made;
  }

  function phases(step) {
    const whole = alongTime() ? Math.max(step.timeline.time_us.at(-1), 1) : Math.max(step.events, 1);
    const place = (p) => alongTime() ? [p.begin_us, p.end_us] : [p.begin_event, p.end_event];
    const bar = (p) => {
      const [begin, end] = place(p);
      const wide = Math.min(end, whole) - begin;
      return el("span", { title: p.phase, style: { left: share(begin, whole), width: share(Math.max(wide, 0), whole) } },
        wide / whole > 0.03 && p.phase !== "recompute" ? p.phase : "");
    };
    const again = step.phases.filter((p) => p.phase === "recompute");
    return [el("div", { class: "phases", "aria-hidden": "true" }, ...step.phases.filter((p) => p.phase !== "recompute").map(bar)),
      again.length ? el("div", { class: "phases recomputes", "aria-hidden": "true" }, ...again.map(bar)) : null];
  }

  function setPoint(point) {
    state.point = point;
    const step = run().step, line = step.timeline, event = line.event[point];
    byId("cursor").style.left = share(places(step)[point], 1);
    const slider = byId("slider");
    slider.value = point;
    const time = timed() ? `, ${(line.time_us[point] / 1000).toFixed(2)} ms` : "";
    const when = event < 0 ? "before the first event" : `event ${count(event)} of ${count(step.events)}${time}`;
    const doing = [line.phase[point], line.module[point]].filter(Boolean).join(" · ");
    slider.setAttribute("aria-valuetext", `${when}, ${doing}, ${fullText(line.allocated_bytes[point])} allocated`);
    byId("where").replaceChildren(el("b", {}, size(line.allocated_bytes[point], true)), ` allocated   ${when}`, el("br"), doing);
    byId("at").replaceChildren(...categories.filter((c) => line.by_category[c.key]).map((c) =>
      el("li", {}, letter(c), c.title, size(line.by_category[c.key][point]))));
  }

  // --- all of it -------------------------------------------------------------------

  function lookAt(index) {
    state.run = index;
    state.point = run().step.timeline.allocated_bytes.indexOf(Math.max(...run().step.timeline.allocated_bytes));
    draw();
  }
  function draw() {
    for (const part of [summary, compare, held, scope, layers, owners, blocks, steps, log]) part();
  }
  byId("exact").addEventListener("change", draw);
  const button = byId("theme"), root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const showTheme = () => button.setAttribute("aria-pressed", String(dark()));
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; showTheme(); });
  showTheme();
  lookAt(0);
})();
