"use strict";
(() => {
  // Text from the data is inserted through `textContent` only and never parsed as HTML.
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, className, ...inside) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    for (const item of inside) if (item !== null && item !== undefined) node.append(item);
    return node;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const CATEGORIES = ["train", "evaluate", "save", "detect", "startup", "regroup", "restart", "restore", "redo", "wait", "idle"];

  // -- numbers ------------------------------------------------------------------------------------------------------
  const integer = (n) => n.toLocaleString("en");
  const digits = (n, count = 4) => {
    if (n !== 0 && (Math.abs(n) < 1e-3 || Math.abs(n) >= 1e6)) return n.toExponential(2);
    return n.toLocaleString("en", { maximumSignificantDigits: count });
  };
  const short = (n) => {
    for (const [factor, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (n >= 0.9995 * factor) return `${Number((n / factor).toPrecision(3))} ${letter}`;
    return `${Number(n.toPrecision(3))}`;
  };
  const size = (n) => {
    for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
      if (n < 1000 || unit === "TB") return `${unit === "B" ? n : n.toFixed(1)} ${unit}`;
      n /= 1000;
    }
  };
  const duration = (s) => {
    if (s < 9.95) return s >= 0.0005 ? `${Number(s.toPrecision(2))} s` : "0 s";
    const n = Math.round(s);
    for (const [large, little, name, lesser] of [[86400, 3600, "d", "h"], [3600, 60, "h", "min"], [60, 1, "min", "s"]])
      if (n >= large) {
        const rest = Math.floor((n % large) / little);
        return `${Math.floor(n / large)} ${name}` + (rest ? ` ${rest} ${lesser}` : "");
      }
    return `${n} s`;
  };
  const share = (part) => {
    const percent = 100 * part;
    if (percent > 0 && percent < 0.1) return "<0.1 %";
    if (percent >= 99.5 && percent < 100) return `${(Math.floor(100 * percent) / 100).toFixed(2)} %`;
    return percent < 9.95 ? `${percent.toFixed(1)} %` : `${percent.toFixed(0)} %`;
  };
  const two = (n) => String(n).padStart(2, "0");
  const when = (t) => {
    const d = new Date(1000 * t);
    return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ` +
      `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
  };

  // -- header -------------------------------------------------------------------------------------------------------
  const head = () => {
    document.title = `${data.run} · outlast report`;
    $("run").textContent = data.run;
    const words = [];
    if (data.attempt) words.push(`attempt ${data.attempt}`);
    if (data.world_size) words.push(`${data.world_size} worker${data.world_size > 1 ? "s" : ""}`);
    words.push(`began ${when(data.begin)}`);
    if (data.wall_s) words.push(`${duration(data.wall_s)} total`);
    $("headline").append(make("span", `state ${data.state}`, data.state));
    for (const word of words) $("headline").append(", ", make("span", "nowrap", word));
    const done = data.num_steps ? Math.min(1, data.step / data.num_steps) : 0;
    $("progress").firstElementChild.style.width = `${100 * done}%`;
    $("progress").setAttribute("aria-label", `${share(done)} of the steps are done`);
    const tile = (value, label, note, lead) =>
      $("figures").append(make("div", `figure${lead ? " lead" : ""}`, make("span", "", label), make("b", "", value), make("span", "", note || "\u00a0")));
    const of = data.num_steps ? `of ${integer(data.num_steps)}` + (data.left_s ? `, ${duration(data.left_s)} left` : `, ${share(done)}`) : "";
    tile(integer(data.step), "step", of);
    const evaluated = data.scores.eval_loss;
    tile(data.loss === null ? "–" : digits(data.loss), "loss", evaluated === undefined ? "" : `evaluation ${evaluated === null ? "not finite" : digits(evaluated)}`);
    tile(data.goodput === null ? "–" : share(data.goodput), "goodput", "of the time not idle", true);
    const ends = data.markers.filter((marker) => marker.kind === "failure" || marker.kind === "end").length;
    const counted = (n, noun) => `${integer(n)} ${noun}${n === 1 ? "" : "s"}`;
    const moments = [ends || !data.num_regroupings ? counted(ends, "interruption") : "", data.num_regroupings ? counted(data.num_regroupings, "regrouping") : ""];
    tile(integer(data.num_lost_steps), "steps lost", `in ${moments.filter(Boolean).join(", ")}`);
    const rate = data.tokens_per_s ? [short(data.tokens_per_s), "tokens/s"] : data.samples_per_s ? [short(data.samples_per_s), "samples/s"] : ["–", ""];
    tile(rate[0], rate[1] || "speed", data.seconds_per_step ? `${duration(data.seconds_per_step)} per step` : "");
    tile(data.save ? duration(data.save.blocked_s) : "–", "save stall", data.save ? `a save takes ${duration(data.save.commit_s)}` : "no save yet");
  };

  // -- charts -------------------------------------------------------------------------------------------------------
  const charts = [];
  const SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800,
    21600, 43200, 86400, 172800, 432000, 864000, 2592000, 8640000];
  const axes = (byTime, value) => {
    const style = { stroke: colour("soft"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, gap: 6, font: "12px system-ui, sans-serif" };
    const x = byTime
      ? { ...style, size: 30, incrs: SECONDS, values: (u, ticks) => ticks.map((t) => (t === 0 ? "0" : duration(t))), space: 70 }
      : { ...style, size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7],
          values: (u, ticks) => ticks.map((n) => (n >= 10000 ? short(n) : integer(n))), space: 60 };
    return [x, { ...style, size: 52, values: (u, ticks) => ticks.map(value), space: 40 }];
  };
  /** Draws bands for repeated steps, and dashed lines for failures and restores. */
  const background = (bands, markers) => (u) => {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.fillStyle = colour("redo");
    ctx.globalAlpha = 0.22;
    for (const [from, to] of bands) {
      const a = u.valToPos(from, "x", true), b = u.valToPos(to, "x", true);
      ctx.fillRect(a, bbox.top, Math.max(2, b - a), bbox.height);
    }
    ctx.globalAlpha = 1;
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const marker of markers) {
      const x = Math.round(u.valToPos(marker.x, "x", true));
      ctx.strokeStyle = colour(MARKERS[marker.kind][0]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  };
  const MARKERS = { failure: ["bad", "failure"], regroup: ["regroup", "regrouped"], end: ["soft", "planned end"], restore: ["good", "resumed"] };
  const markerText = (marker) =>
    marker.kind === "restore" ? `${marker.cause} from step ${integer(marker.step)}`
      : marker.cause + (marker.rank === null || marker.rank === undefined ? "" : ` (rank ${marker.rank})`) + (marker.message ? `: ${marker.message.slice(0, 120)}` : "");
  /** Shows the values at the cursor beside it. */
  const tooltip = (place, words, markers) => (u) => {
    let tip = place.querySelector(".tip");
    const { left, top, idx } = u.cursor;
    const near = markers.filter((marker) => Math.abs(u.valToPos(marker.x, "x") - left) < 7).map(markerText);
    const text = left < 0 ? "" : [idx === null || idx === undefined ? "" : words(idx, u), ...near.slice(0, 3)].filter(Boolean).join("\n");
    if (!text) {
      if (tip) tip.hidden = true;
      return;
    }
    if (!tip) place.append((tip = make("div", "tip")));
    tip.hidden = false;
    tip.textContent = text;
    const x = left + u.over.offsetLeft, flip = x > place.clientWidth / 2;
    tip.style.left = flip ? "auto" : `${x + 14}px`;
    tip.style.right = flip ? `${place.clientWidth - x + 14}px` : "auto";
    tip.style.top = `${Math.max(0, Math.min(top, place.clientHeight - tip.offsetHeight - 30))}px`;
  };
  const chart = (id, { rows, series, byTime, value, words, bands = [], markers = [], range }) => {
    const place = $(id);
    if (!rows[0].length) {
      place.classList.add("empty");
      place.textContent = "nothing yet";
      return;
    }
    const build = () => {
      place.replaceChildren();
      const [first, last] = [rows[0][0], rows[0][rows[0].length - 1]];
      const u = new uPlot({
        width: place.clientWidth, height: place.clientHeight, legend: { show: false }, padding: [8, 26, 0, 0],
        cursor: { y: false, points: { size: 7 } },
        scales: { x: { time: false, range: (u, a, b) => (a === b ? [first - 1, last + 1] : [a, b]) }, y: { range } },
        axes: axes(byTime, value),
        series: [{}, ...series().map((item) => ({ points: { show: rows[0].length < 3 }, ...item }))],
        hooks: { drawClear: [background(bands, markers)], setCursor: [tooltip(place, words, markers)] },
      }, rows, place);
      place.dataset.markers = markers.length;
      place.dataset.bands = bands.length;
      return u;
    };
    const entry = { place, build, u: build() };
    charts.push(entry);
  };
  /** Joins steps and evaluations on one x column, as uPlot requires, from the first x to the last. */
  const joined = (x, y, others, first, last) => {
    if (!x.length && !others.x.length) return [[], [], []];
    const ends = [[first, last].filter((end, index, all) => all.indexOf(end) === index), []];
    ends[1] = ends[0].map(() => null);
    return uPlot.join([[x, y], [others.x, others.loss], ends], [[2, 2], [2, 2], [2]]).slice(0, 3);
  };
  /** The top of the chart: a few values far above all others are cut off, because they would flatten it. */
  const ceiling = (values) => {
    const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
    const [low, high] = [0.02, 0.98].map((part) => sorted[Math.floor(part * (sorted.length - 1))]);
    return high + 2 * (high - low) || Infinity;
  };
  const lossCeiling = Math.max(ceiling(data.by_step.loss), ...data.by_step.eval.loss);
  const padded = (u, low, high) => {
    if (low === null || high === null) return [0, 1];
    const top = Math.max(low, Math.min(high, lossCeiling)), room = (top - low) * 0.06 || Math.abs(top) * 0.1 || 1;
    return [low - room, top + room];
  };
  const line = () => ({ stroke: colour("accent"), width: 1.6, spanGaps: false });
  const dots = (number) => number > 60 ? { stroke: colour("eval"), width: 1.2, dash: [3, 3], spanGaps: true, points: { show: false } } : ({ stroke: colour("eval"), width: 0, paths: () => null, points: { show: true, size: 7, stroke: colour("eval"), fill: colour("card"), width: 1.8 } });
  const lossCharts = () => {
    const { by_step: s, by_time: t } = data;
    const series = () => [line(), dots(s.eval.x.length)];
    const steps = joined(s.x, s.loss, s.eval, 0, data.num_steps || data.step);
    const lr = new Map(s.x.map((step, index) => [step, s.lr[index]]));
    const values = (rows, idx) => [
      rows[1][idx] !== null && rows[1][idx] !== undefined ? `loss ${digits(rows[1][idx], 5)}` : "",
      rows[2][idx] !== null && rows[2][idx] !== undefined ? `evaluation ${digits(rows[2][idx], 5)}` : "",
    ];
    chart("by-step", {
      rows: steps, series, byTime: false, value: (n) => digits(n), range: padded,
      bands: data.redone.steps,
      markers: data.markers.filter((marker) => marker.step !== null).map((marker) => ({ ...marker, x: marker.step })),
      words: (idx) => [`step ${integer(steps[0][idx])}`, ...values(steps, idx), lr.has(steps[0][idx]) ? `lr ${digits(lr.get(steps[0][idx]), 3)}` : ""].filter(Boolean).join("\n"),
    });
    const times = joined(t.x, t.loss, t.eval, 0, data.wall_s);
    const step = new Map(t.x.map((at, index) => [at, t.step[index]]));
    chart("by-time", {
      rows: times, series, byTime: true, value: (n) => digits(n), range: padded,
      bands: data.redone.time, markers: data.markers.map((marker) => ({ ...marker, x: marker.t })),
      words: (idx) => [`after ${duration(times[0][idx])}`, step.has(times[0][idx]) ? `step ${integer(step.get(times[0][idx]))}` : "", ...values(times, idx)].filter(Boolean).join("\n"),
    });
    const legend = $("loss-legend");
    const entry = (className, name, words) => {
      const icon = make("i", className);
      if (className === "band") Object.assign(icon.style, { background: `var(--${name})`, opacity: 0.35 });
      else icon.style.borderColor = `var(--${name})`;
      legend.append(make("li", "", icon, words));
    };
    if (s.x.length) entry("", "accent", "training");
    if (s.eval.x.length) entry(s.eval.x.length > 60 ? "dots" : "dot", "eval", "evaluation");
    for (const [kind, [name, words]] of Object.entries(MARKERS))
      if (data.markers.some((marker) => marker.kind === kind)) entry("dash", name, words);
    if (data.redone.steps.length) entry("band", "redo", "repeated steps");
    const above = s.loss.filter((value) => value > lossCeiling);
    if (above.length) legend.append(make("li", "", `losses above the chart, up to ${digits(above.reduce((a, b) => Math.max(a, b)))}`));
    if (s.x.length) legend.append(make("li", "", "drag to zoom, double-click to reset"));
  };
  const otherCharts = () => {
    const { workers: w, speed: v } = data;
    const bottom = (u, low, high) => [0, (high || 1) * 1.1];
    const filled = () => [{ stroke: colour("accent"), width: 1.6, fill: colour("accent-soft"), paths: uPlot.paths.stepped({ align: 1 }) }];
    chart("workers", {
      rows: [w.x, w.y].map((list) => (data.by_step.x.length || data.attempt ? list : [])), series: filled, byTime: true,
      value: (n) => (Number.isInteger(n) ? integer(n) : ""), range: bottom,
      words: (idx, u) => {
        const at = u.posToVal(u.cursor.left, "x"), size = w.y[w.x.findLastIndex((x) => x <= at)] ?? 0;
        return `after ${duration(Math.max(0, at))}\n${size} worker${size === 1 ? "" : "s"}`;
      },
    });
    $("speed-caption").textContent = `${v.unit}, by wall time`;
    const ends = v.x.length ? [[0, ...v.x, data.wall_s], [null, ...v.y, null]] : [[], []];
    chart("speed", {
      rows: ends, series: () => [line()], byTime: true, value: (n) => short(n), range: bottom,
      words: (idx) => (ends[1][idx] === null ? "" : `after ${duration(ends[0][idx])}\n${short(ends[1][idx])} ${v.unit}`),
    });
    const { x, lr } = data.by_step;
    chart("lr", {
      rows: [x, lr], series: () => [line()], byTime: false, value: (n) => (n ? n.toExponential(1) : "0"), range: bottom,
      words: (idx) => `step ${integer(x[idx])}\nlr ${digits(lr[idx], 3)}`,
    });
  };

  const scoreCharts = () => {
    $("scores").hidden = !data.scores_by_step.length;
    for (const [index, { name, x, y }] of data.scores_by_step.entries()) {
      const place = make("div", "chart low");
      place.id = `score-${index}`;
      $("scores").querySelector(".three").append(make("figure", "", make("figcaption", "", `${name}, by step`), place));
      const range = (u, low, high) => [low - ((high - low) * 0.06 || 0.05), high + ((high - low) * 0.06 || 0.05)];
      chart(place.id, {
        rows: [x, y], series: () => [{ ...line(), points: { show: x.length <= 60 } }], byTime: false, value: (n) => digits(n), range,
        words: (idx) => `step ${integer(x[idx])}\n${name} ${digits(y[idx], 5)}`,
      });
    }
  };

  // -- where the time went ------------------------------------------------------------------------------------------
  const timeSpent = () => {
    const strip = $("strip"), total = data.wall_s || 1;
    strip.setAttribute("aria-label", "timeline of the run by time category");
    for (const [from, to, category] of data.spans) {
      const part = make("i");
      part.style.flex = `${to - from} 1 0`;
      part.style.background = `var(--${CATEGORIES[category]})`;
      part.title = `${data.categories[category].name}: ${duration(to - from)}, starting at ${duration(from)}`;
      strip.append(part);
    }
    if (!data.spans.length) strip.hidden = true;
    else $("strip-axis").append(make("span", "", when(data.begin)), make("span", "", when(data.begin + data.wall_s)));
    for (const [index, category] of data.categories.entries()) {
      const chip = make("i");
      chip.style.background = `var(--${CATEGORIES[index]})`;
      $("time-spent").append(make("tr", category.seconds ? "" : "none", make("td", "name", chip, category.name),
        make("td", "number", duration(category.seconds)), make("td", "number", share(category.seconds / total)), make("td", "what", category.description)));
    }
    $("time-spent").append(make("tr", "sum", make("td", "name", "total"), make("td", "number", duration(data.wall_s)),
      make("td", "number", data.wall_s ? "100 %" : "–"), make("td", "what")));
  };

  // -- tables -------------------------------------------------------------------------------------------------------
  const plain = (value) => (value === null || value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  const attempts = () => {
    const place = $("attempts");
    for (const item of [...data.attempts].reverse()) {
      const tag = item.cause === "done" ? "done" : !item.cause ? "live" : item.is_planned || item.is_regrouped ? "plain" : "failed";
      const made = item.steps ? `steps ${integer(item.steps[0])} to ${integer(item.steps[1])}` : "no steps";
      const from = !item.has_begun ? "ended before it started" : item.in_memory ? `in memory from step ${integer(item.start_step)}` : item.from === null ? "from the beginning" : `from checkpoint ${integer(item.from)}`;
      const spent = (item.ended_at || data.now) - item.claimed_at;
      const versions = Object.entries(item.versions).map(([name, version]) => `${name} ${version}`).join(", ");
      const where = [item.hosts.filter(Boolean).join(", "), item.world_size ? `${item.world_size} worker${item.world_size > 1 ? "s" : ""}` : "", item.device, item.parallel, versions].filter(Boolean).join(" · ");
      const notes = data.notes.filter((note) => note.attempt === item.number);
      place.append(make("div", "card", make("span", "who", `Attempt ${item.number}`),
        make("span", "how", make("span", `tag ${tag}`, item.cause || "running"), ` ${from}, ${made}`),
        make("span", "when", `${when(item.claimed_at)}, ${duration(Math.max(0, spent))}`),
        item.message ? make("span", "detail message", item.message) : null,
        item.where ? make("span", "detail mono", item.where) : null,
        where ? make("span", "detail", where) : null,
        ...notes.slice(-10).map((note) => make("span", "detail", `${when(note.t)}  ${note.event}: ${note.text}`))));
    }
    if (!data.attempts.length) place.append(make("p", "note", "No worker has started yet."));
  };
  const regroupings = () => {
    $("regrouped").hidden = !data.regroupings.length;
    for (const item of [...data.regroupings].reverse()) {
      const phases = Object.entries(item.phases).map(([name, seconds]) => `${name} ${duration(seconds)}`).join(", ");
      const source = item.source === null ? "" : `state of rank ${item.source}, after step ${integer(item.step)}; `;
      $("regroupings").append(make("div", "card", make("span", "who", `Attempt ${item.number}`), make("span", "how", item.description),
        make("span", "when", when(item.at)), make("span", "detail", item.outcome), make("span", "detail", source + phases)));
    }
  };
  const checkpoints = () => {
    const { rows, num_committed: count } = data.checkpoints;
    const kept = rows.filter((row) => row.digest).length;
    $("checkpoints-note").textContent = !rows.length ? "None yet."
      : (kept < count ? `${kept} of ${count} committed checkpoints ${kept === 1 ? "is" : "are"} kept; retention deleted the others. ` : "") +
        (data.is_verified ? "Every byte was read for this report." : "Each entry shows when its bytes were last read; --verify reads them all.");
    for (const row of rows) {
      const metrics = Object.entries(row.metrics || {}).map(([name, value]) => `${name.replaceAll("_", " ")} ${digits(value)}`).join(", ");
      const words = row.verification === "unverified" ? "not verified" : row.verification;
      const tags = make("span", "tags", make("span", `tag ${row.verification}`, words));
      if (row.pinned) tags.append(" ", make("span", "tag pinned", "pinned"));
      const inside = make("div", "inside soft", make("p", "", row.detail + (row.at ? `, ${when(row.at)}` : "")),
        make("p", "", `attempt ${row.attempt}`));
      if (row.digest) inside.append(make("p", "mono", `manifest ${row.digest}`));
      if (row.files) {
        const table = make("table", "mono");
        for (const file of row.files) table.append(make("tr", "", make("td", "", file.path), make("td", "", size(file.bytes)), make("td", "", file.xxh3_128)));
        inside.append(table);
        if (row.num_files > row.files.length) inside.append(make("p", "", `and ${row.num_files - row.files.length} more files`));
      }
      $("checkpoints").append(make("details", "", make("summary", "", make("b", "", integer(row.step)),
        make("span", "when soft", row.committed_at ? when(row.committed_at) : ""), make("span", "bytes", row.bytes ? size(row.bytes) : ""),
        make("span", "metrics soft", metrics), tags), inside));
    }
  };
  const settings = () => {
    $("settings").textContent = data.settings || "The run has no recorded settings.";
    if (!data.changes.length) return;
    const body = make("tbody");
    for (const item of data.changes)
      body.append(make("tr", "", make("td", "", `attempt ${item.attempt}`), make("td", "mono", item.key), make("td", "mono", plain(item.before)), make("td", "mono", `→ ${plain(item.now)}`)));
    const headings = make("tr", "", ...["since", "setting", "before", "now"].map((words) => make("th", "", words)));
    $("changes").append(make("table", "", make("thead", "", headings), body));
  };

  head();
  lossCharts();
  scoreCharts();
  timeSpent();
  otherCharts();
  regroupings();
  attempts();
  checkpoints();
  settings();
  $("footer").textContent = `outlast ${data.version}, ${when(data.now)}. This page is self-contained and fetches nothing.`;
  const redraw = () => charts.forEach((entry) => {
    entry.u.destroy();
    entry.u = entry.build();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    charts.forEach(({ u, place }) => u.setSize({ width: place.clientWidth, height: place.clientHeight }));
  });
  document.documentElement.dataset.ready = "yes";
})();
