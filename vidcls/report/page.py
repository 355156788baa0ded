"""What every report has in common: markup, style and program. Data is shown through textContent, never as markup."""

BODY = """<body>
<header><h1 id="name"></h1><p id="state"></p>
<nav aria-label="Sections" id="sections"></nav></header>
<noscript><p>This page needs JavaScript.</p></noscript>
<main>
<section id="training"><h2>Training</h2><div class="charts" id="curves"></div></section>
<section id="evaluation"><h2>Evaluation</h2>
<p id="none">No evaluation yet: launch/evaluate.py CHECKPOINT --data SHARDS.</p>
<div id="results">
<p><label>of <select id="which"></select></label></p>
<dl class="numbers" id="numbers"></dl>
<h3>Mistakes that the model was most sure of</h3><p id="no-mistakes">None are stored.</p><ul id="mistakes"></ul>
<h3>Confusion</h3>
<form onsubmit="return false">
<label>class <input type="search" id="confusion-search" placeholder="part of a name"></label>
<label>order <select id="order"><option value="errors">most mistaken first</option><option value="alike">confused ones
together</option><option value="label">as labelled</option></select></label>
<label>show <select id="scale"><option value="share">share of the true class</option><option value="clips">clips
</option></select></label>
</form>
<div id="confusion"></div>
<table id="pairs"><caption>Which class is taken for which</caption></table>
<h3>Classes</h3>
<form onsubmit="return false"><label>class <input type="search" id="class-search" placeholder="part of a name"></label>
<output id="class-count"></output></form>
<table id="classes"><caption>Click a column to sort by it</caption></table>
<h3>Calibration</h3><div class="charts"><div class="chart" id="calibration"></div></div>
</div></section>
<section id="made"><h2>How it was made</h2>
<h3>Again</h3><pre id="commands"></pre>
<h3>Data</h3><table id="data"></table>
<h3>Versions</h3><table id="versions"></table>
<h3>Recipe, as resolved</h3>
<form onsubmit="return false">
<label>key <input type="search" id="recipe-search" placeholder="part of a key"></label></form>
<table id="recipe"></table></section>
</main>
</body>"""

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --text: #1d1f21; --quiet: #5d6368; --line: #dcdfe2;
  --link: #0b57a4; --bad: #a3261b; --good: #1f7a3a; --low: #d6e4f3; --high: #08306b; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181a; --card: #202326; --text: #e6e8ea; --quiet: #a3abb2;
  --line: #363b40; --link: #8ec2ff; --bad: #ff9c8f; --good: #8fdca5; --low: #24374d; --high: #a8d1ff; } }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.45 system-ui, sans-serif; background: var(--ground); color: var(--text); }
header { position: sticky; top: 0; z-index: 5; padding: .6rem 1rem; background: var(--card);
  border-bottom: 1px solid var(--line); }
h1 { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; } header p { margin: 0; color: var(--quiet); }
nav a { margin-right: 1rem; color: var(--link); text-decoration: none; } nav a:hover { text-decoration: underline; }
main { max-width: 78rem; margin: 0 auto; padding: 0 1rem 4rem; } section { scroll-margin-top: 6rem; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.charts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.chart, #confusion { background: var(--card); border: 1px solid var(--line); border-radius: 8px; min-width: 0;
  min-height: 280px; overflow: hidden; }
#confusion { min-height: 20rem; }
.numbers { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: .6rem 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem .7rem; }
dt { color: var(--quiet); font-size: .85rem; } dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: .78rem; color: var(--quiet); }
form { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; margin: .3rem 0 .6rem; }
input, select { font: inherit; padding: .2rem .4rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--ground); color: inherit; max-width: 60vw; }
table { border-collapse: collapse; width: 100%; background: var(--card); margin: .5rem 0; }
caption { text-align: left; color: var(--quiet); padding: .2rem 0; }
th, td { text-align: left; padding: .22rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere;
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; overflow-x: auto; }
#mistakes { list-style: none; margin: 0; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
#mistakes li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
#mistakes img { display: block; width: 100%; height: auto; border-radius: 4px; margin-bottom: .35rem; }
.bad { color: var(--bad); } .good { color: var(--good); } .quiet { color: var(--quiet); font-size: .85rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; } [hidden] { display: none !important; }
@media (max-width: 40rem) { header { position: static; } th, td { padding: .2rem .3rem; }
  main { padding: 0 .6rem 3rem; } }
"""

PROGRAM = """
"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const byId = (id) => document.getElementById(id);
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const percent = (share) => (100 * share).toFixed(1) + "\\u00a0%";
const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
const CLEAR = "rgba(0,0,0,0)";
const BASE = { paper_bgcolor: CLEAR, plot_bgcolor: CLEAR, font: { color: colour("--text"), size: 12 },
  margin: { l: 55, r: 15, t: 44, b: 42 },
  legend: { orientation: "h", x: 1, xanchor: "right", y: 1, yanchor: "bottom" } };
const CONFIG = { responsive: true, displayModeBar: false };
const GRID = { gridcolor: colour("--line"), zerolinecolor: colour("--line") };
// What data sets and classes are called is text: plotly takes some tags for markup.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
function chart(element, title, traces, layout) {
  Plotly.newPlot(element, traces, { ...BASE, height: 280,
    title: { text: plain(title), font: { size: 14 }, x: 0.02, y: 0.97, yanchor: "top" }, ...layout }, CONFIG);
}

// Training: one chart for each group of keys that the log has.
const CURVES = [
  ["loss", (key) => key === "loss" || /^eval.*loss$/.test(key) || key.endsWith("/loss") || key === "lm_loss", {}],
  ["accuracy", (key) => /top[15]|accuracy/.test(key), { range: [0, 1] }],
  ["learning rate", (key) => key === "lr", {}],
  ["gradient norm", (key) => key === "grad_norm", { type: "log" }],
  ["clips per second", (key) => key === "samples_per_second", { rangemode: "tozero" }],
  ["share of time spent waiting for data", (key) => key === "data_wait_fraction", { rangemode: "tozero" }],
];
function curves() {
  const drawn = [];  // once all have their places: a chart that is drawn alone takes the whole row
  for (const [title, belongs, axis] of CURVES) {
    const keys = [...new Set(report.log.flatMap(Object.keys))].filter(belongs);
    const traces = keys.map((key) => {
      const rows = report.log.filter((row) => typeof row[key] === "number");
      return { name: plain(key), x: rows.map((row) => row.step), y: rows.map((row) => row[key]),
        mode: rows.length > 60 && !key.startsWith("eval") ? "lines" : "lines+markers" };
    });
    if (!traces.length) continue;
    const element = make("div", { className: "chart" });
    byId("curves").append(element);
    drawn.push([element, title, traces, { xaxis: { ...GRID, title: { text: "optimizer step" } },
      yaxis: { ...GRID, ...axis }, showlegend: traces.length > 1 }]);
  }
  for (const each of drawn) chart(...each);
  if (!byId("curves").childElementCount) byId("curves").append(make("p", { textContent: "Nothing is logged yet." }));
}

// Evaluation
let result = null;
function numbers() {
  const of = result.metrics, shown = [
    ["top-1", percent(of.top1), "95 %: " + of.top1_interval.map(percent).join(" to ")],
    ["top-5", percent(of.top5)], ["mean class accuracy", percent(of.mean_class_accuracy)],
    ["macro F1", percent(of.macro_f1)], ["loss", of.loss.toFixed(3), "nats a clip"],
    ["calibration error", percent(of.calibration_error)],
    ["clips", of.seen.toLocaleString("en"), of.missing ? of.missing + " could not be read" : "all of them"],
    ["views a clip", of.views.segments * of.views.crops, of.control === "none" ? "" : "control: " + of.control],
  ];
  const small = (note) => (note ? [make("small", { textContent: note })] : []);
  byId("numbers").replaceChildren(...shown.map(([name, value, note]) => make("div", {},
    make("dt", { textContent: name }), make("dd", { textContent: value }, ...small(note)))));
}
function mistakes() {
  byId("no-mistakes").hidden = result.mistakes.length > 0;
  byId("mistakes").replaceChildren(...result.mistakes.map((one) => make("li", {},
    make("img", { src: "data:image/jpeg;base64," + one.jpeg, alt: "frames of " + one.key, loading: "lazy" }),
    make("div", {}, make("b", { className: "bad", textContent: one.predicted }),
      " " + percent(one.confidence)),
    make("div", {}, "is ", make("b", { className: "good", textContent: one.true }), " " + percent(one.true_score)),
    make("div", { className: "quiet", textContent: one.key }))));
}
const matches = (name, query) => name.toLowerCase().includes(query.trim().toLowerCase());
function ordered(how) {
  const counts = result.confusion, classes = counts.map((_, i) => i);
  if (how === "label") return classes;
  const wrong = classes.map((i) => counts[i].reduce((sum, n, j) => sum + (i === j ? 0 : n), 0));
  classes.sort((a, b) => wrong[b] - wrong[a] || a - b);
  if (how === "errors") return classes;
  // One after the other, each time the class that is confused most with the last one.
  const left = new Set(classes), found = [];
  let now = classes[0];
  while (left.size) {
    left.delete(now); found.push(now);
    let next = null, most = 0;
    for (const other of left) {
      const both = counts[now][other] + counts[other][now];
      if (both > most) { most = both; next = other; }
    }
    now = next === null ? left.values().next().value : next;
  }
  return found;
}
function confusion() {
  const names = result.names, counts = result.confusion, query = byId("confusion-search").value;
  let shown = ordered(byId("order").value);
  if (query.trim()) {
    const hit = new Set(shown.filter((i) => matches(names[i], query)));
    shown = shown.filter((i) => hit.has(i) || shown.some((j) => hit.has(j) && (counts[i][j] || counts[j][i])));
  }
  const total = (i) => Math.max(1, counts[i].reduce((a, b) => a + b, 0)), share = byId("scale").value === "share";
  const z = shown.map((i) => shown.map((j) => (share ? counts[i][j] / total(i) : counts[i][j])));
  const text = shown.map((i) => shown.map((j) => counts[i][j] + " of " + total(i) + " clips of<br>" + plain(names[i]) +
    "<br>are taken for<br>" + plain(names[j])));
  const labels = shown.map((i) => plain(names[i].length > 34 ? names[i].slice(0, 33) + "\\u2026" : names[i]));
  const places = shown.map((_, place) => place), few = shown.length <= 60;
  const axis = { tickvals: places, ticktext: labels, tickfont: { size: few ? 11 : 8 }, showgrid: false, zeroline: false,
    showticklabels: window.innerWidth > 640 || shown.length <= 12 };
  const room = byId("confusion").clientWidth;
  const height = Math.max(340, Math.min(1.5 * room, 1900, 190 + shown.length * (few ? 22 : 10)));
  Plotly.react("confusion", [{ type: "heatmap", z, x: places, y: places, text, hovertemplate: "%{text}<extra></extra>",
    colorscale: [[0, colour("--card")], [0.001, colour("--low")], [1, colour("--high")]], zmin: 0,
    xgap: few ? 1 : 0, ygap: few ? 1 : 0,
    colorbar: { thickness: 10, tickformat: share ? ".0%" : "" } }],
    { ...BASE, height, margin: { l: 20, r: 10, t: 20, b: 20 },
      xaxis: { ...axis, automargin: true, tickangle: -60, title: { text: "predicted" } },
      yaxis: { ...axis, automargin: true, autorange: "reversed", title: { text: "true" } } }, CONFIG);
  const pairs = [];
  for (const i of shown) for (const j of shown) if (i !== j && counts[i][j])
    pairs.push({ true: names[i], "taken for": names[j], clips: counts[i][j], share: counts[i][j] / total(i) });
  pairs.sort((a, b) => b.clips - a.clips || b.share - a.share);
  fill(byId("pairs"), ["true", "taken for", "clips", "share"], pairs.slice(0, 25));
}
// Tables: head with a button a column where they can be sorted; the way they are sorted stays.
function fill(table, columns, rows, sortBy = null) {
  const numeric = (column) => rows.length > 0 && rows.every((row) => typeof row[column] === "number");
  const cell = (row, column) => {
    const value = row[column], number = typeof value === "number";
    const text = !number ? value : Number.isInteger(value) && column !== "share" && !SHARES.has(column)
      ? value.toLocaleString("en") : SHARES.has(column) ? percent(value) : String(value);
    return make("td", { className: number ? "number" : "", textContent: text });
  };
  const head = columns.map((column) => {
    const pressed = { type: "button", textContent: column, onclick: () => sortBy(column) };
    const title = sortBy ? make("button", pressed) : column;
    const th = make("th", { scope: "col", className: numeric(column) ? "number" : "" }, title);
    if (sortBy && table.sortedBy && table.sortedBy.column === column)
      th.setAttribute("aria-sort", table.sortedBy.down ? "descending" : "ascending");
    return th;
  });
  for (const part of table.querySelectorAll("thead, tbody")) part.remove();
  table.append(make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...columns.map((column) => cell(row, column))))));
}
const SHARES = new Set(["share", "precision", "recall", "f1"]);
function classes() {
  const table = byId("classes"), query = byId("class-search").value;
  const sorted = table.sortedBy || (table.sortedBy = { column: "f1", down: false });
  const rows = result.classes.filter((row) => matches(row.class, query));
  const compare = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
  rows.sort((a, b) => (sorted.down ? -1 : 1) * compare(a[sorted.column], b[sorted.column]));
  fill(table, ["class", "clips", "precision", "recall", "f1"], rows, (column) => {
    table.sortedBy = { column, down: sorted.column === column ? !sorted.down : column !== "class" };
    classes();
  });
  byId("class-count").textContent = rows.length + " of " + result.classes.length + " classes";
}
function calibration() {
  const bins = result.metrics.calibration.filter((bin) => bin.clips);
  const x = bins.map((bin) => bin.confidence), most = Math.max(...bins.map((bin) => bin.clips));
  chart(byId("calibration"), "how often it is right, by how sure it is", [
    { x: [0, 1], y: [0, 1], mode: "lines", line: { dash: "dot", color: colour("--quiet") }, name: "as it should be",
      hoverinfo: "skip" },
    { x, y: bins.map((bin) => bin.accuracy), mode: "lines+markers", name: "right",
      text: bins.map((bin) => bin.clips + " clips"),
      marker: { size: bins.map((bin) => 6 + 14 * Math.sqrt(bin.clips / most)) } },
  ], { xaxis: { ...GRID, range: [0, 1], title: { text: "confidence" } },
    yaxis: { ...GRID, range: [0, 1.02], title: { text: "share right" } }, height: 380 });
}
function show(which) {
  result = report.results[which];
  numbers(); mistakes(); confusion(); classes(); calibration();
}
function evaluation() {
  const any = report.results.length > 0;
  byId("none").hidden = any; byId("results").hidden = !any;
  if (!any) return;
  byId("which").append(...report.results.map((one, i) => make("option", { value: i, textContent: one.title })));
  byId("which").onchange = () => show(Number(byId("which").value));
  for (const id of ["confusion-search", "order", "scale"]) byId(id).oninput = confusion;
  byId("class-search").oninput = classes;
  show(0);
}
// How it was made
function pairsOf(object) { return Object.entries(object).map(([key, value]) => ({ key, value: String(value) })); }
function made() {
  byId("commands").textContent = report.commands.join("\\n");
  fill(byId("data"), ["key", "value"], pairsOf(report.data));
  fill(byId("versions"), ["key", "value"], pairsOf(report.versions));
  const recipe = () => fill(byId("recipe"), ["key", "value"],
    pairsOf(report.recipe).filter((row) => matches(row.key, byId("recipe-search").value)));
  byId("recipe-search").oninput = recipe;
  recipe();
}
document.title = report.name;
byId("name").textContent = report.name;
byId("state").textContent = report.state;
for (const [id, title] of [["training", "Training"], ["evaluation", "Evaluation"], ["made", "How it was made"]])
  byId("sections").append(make("a", { href: "#" + id, textContent: title }));
curves(); evaluation(); made();
document.documentElement.dataset.ready = "yes";
"""
