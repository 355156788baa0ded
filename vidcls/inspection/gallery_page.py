"""What every page of gallery.py has in common: markup, style and program."""

BODY = """<body>
<a class="skip" href="#clips">Skip to the clips</a>
<header>
<h1 id="place"></h1>
<p id="totals"></p>
<form role="search">
<label>Search <input id="query" type="search" placeholder="class, key or source" autocomplete="off"></label>
<label><input id="damaged" type="checkbox"> damaged only</label>
<output id="matching" for="query damaged"></output>
</form>
<noscript><p>This page needs JavaScript to show the clips.</p></noscript>
</header>
<nav aria-label="Classes"><details id="contents" open><summary>Classes</summary><ul id="names"></ul></details></nav>
<main id="clips" tabindex="-1"></main>
</body>"""

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --text: #1d1f21; --quiet: #5d6368; --line: #dcdfe2;
  --link: #0b57a4; --warn: #8a4b00; --warn-ground: #fff0d6; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181a; --card: #202326; --text: #e6e8ea; --quiet: #a3abb2;
  --line: #363b40; --link: #8ec2ff; --warn: #ffd08a; --warn-ground: #43310f; } }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.45 system-ui, sans-serif; background: var(--ground); color: var(--text);
  display: grid; grid-template-columns: 17rem minmax(0, 1fr); grid-template-rows: auto 1fr; min-height: 100vh; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; top: 1rem; background: var(--card); z-index: 2; }
header { grid-column: 1 / -1; position: sticky; top: 0; z-index: 1; padding: .7rem 1rem; background: var(--card);
  border-bottom: 1px solid var(--line); }
h1 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; } header p { margin: 0 0 .5rem; color: var(--quiet); }
form { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; }
input[type=search] { font: inherit; width: min(22rem, 60vw); padding: .25rem .5rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--ground); color: inherit; }
output, .quiet { color: var(--quiet); }
a[href] { color: var(--link); } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
nav { position: sticky; top: 7rem; align-self: start; max-height: calc(100vh - 7rem); overflow-y: auto;
  padding: .8rem .4rem .8rem 1rem; }
nav summary { font-weight: 600; cursor: pointer; } nav ul { list-style: none; margin: .3rem 0; padding: 0; }
nav li { display: flex; justify-content: space-between; gap: .6rem; padding: .12rem .5rem .12rem 0; }
nav li a { overflow-wrap: anywhere; text-decoration: none; } nav li a[href]:hover { text-decoration: underline; }
nav li a:not([href]), nav li span { color: var(--quiet); font-variant-numeric: tabular-nums; }
main { padding: .4rem 1rem 4rem; outline: none; } section { scroll-margin-top: 8rem; }
h2 { font-size: 1rem; margin: 1.2rem 0 .5rem; overflow-wrap: anywhere; } h2 .quiet { font-weight: 400; }
ul.clips { list-style: none; margin: 0; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
ul.pairs { grid-template-columns: minmax(0, 1fr); }
ul.pairs > li { border: 1px solid var(--line); border-radius: 8px; padding: .6rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .6rem; }
figure { margin: 0; padding: .5rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  height: 100%; }
figure img { display: block; width: 100%; max-width: 36rem; height: auto; border-radius: 4px; }
figcaption { margin-top: .35rem; font-size: .85rem; overflow-wrap: anywhere; } figcaption b { font-weight: 600; }
.warn { display: inline-block; padding: 0 .4rem; border-radius: 4px; background: var(--warn-ground);
  color: var(--warn); }
[hidden] { display: none !important; }
@media (max-width: 50rem) {
  body { display: block; } nav { position: static; max-height: none; padding: .6rem 1rem 0; }
  nav ul { max-height: 40vh; overflow-y: auto; } header { position: static; } main { padding: 0 .7rem 3rem; } }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
"""

# All that is shown of a clip goes through textContent and attributes, never through markup.
PROGRAM = """
"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const facts = read("facts"), classes = read("classes"), similar = read("pairs");
const byId = (id) => document.getElementById(id);
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const quiet = (text) => make("span", { className: "quiet", textContent: text });
const warning = (text) => make("span", { className: "warn", textContent: text });
const many = (n, what) => n.toLocaleString("en") + " " + what + (n === 1 ? "" : "s");

function figure(clip, picture) {
  const caption = make("figcaption", {}, make("b", { textContent: clip.key }));
  const line = (element) => caption.append(make("br"), element);
  if (clip.source) line(quiet(clip.source));
  if (clip.problem === null) line(quiet(clip.seconds.toFixed(1) + " s, " + many(clip.frames, "frame")));
  if (clip.damage !== null) line(warning("damaged: " + clip.damage));
  if (clip.problem !== null) line(warning(clip.problem));
  const parts = [caption];
  if (picture !== null)
    parts.unshift(make("img", { alt: "first, middle and last frame of " + clip.key, width: clip.width, height: 96,
      decoding: "async", src: "data:image/jpeg;base64," + picture }));
  return make("figure", {}, ...parts);
}

// A section has elements for its entries only while it is near the window; else it keeps their room.
const sections = [], MARGIN = 1000;
function addSection(title, note, id, entries, kind, open) {
  const heading = make("h2", {}, title + " ", quiet(note)), list = make("ul", { className: "clips " + kind });
  const element = make("section", { id: id }, heading, list);
  heading.id = id + "-name";
  element.setAttribute("aria-labelledby", heading.id);
  byId("clips").append(element);
  const section = { element, list, entries, open, kind, shown: entries.map((_, i) => i), near: false };
  element.section = section;
  sections.push(section);
  return section;
}
function fill(section) {
  section.list.style.minHeight = "";
  const build = section.open();
  section.list.replaceChildren(...section.shown.map((i) => make("li", {}, build(i))));
}
function empty(section) {
  const columns = section.kind ? 1 : Math.max(1, Math.floor(section.list.clientWidth / 315));
  const guess = Math.ceil(section.shown.length / columns) * (section.kind ? 260 : 190);
  section.list.style.minHeight = (section.list.childElementCount ? section.list.offsetHeight : guess) + "px";
  section.list.replaceChildren();
}
const observer = new IntersectionObserver((changes) => {
  for (const { target, isIntersecting } of changes) {
    const section = target.section;
    if (section.near === isIntersecting) continue;
    section.near = isIntersecting;
    if (isIntersecting) fill(section); else empty(section);
  }
}, { rootMargin: MARGIN + "px 0px" });
// At once, where the observer would come a frame later: after loading, and when a search has moved everything.
function settle() {
  for (const section of sections) {
    const { top, bottom } = section.element.getBoundingClientRect();
    if (section.near || section.element.hidden || top > innerHeight + MARGIN || bottom < -MARGIN) continue;
    section.near = true;
    fill(section);
  }
}

function pairText(pair) {
  const classes = pair.class_name === pair.other_class ? pair.class_name : pair.class_name + " and " + pair.other_class;
  const distance = pair.distance === null ? "" : pair.distance + " of 256 bits differ";
  return [classes, pair.detail, distance].filter(Boolean).join(", ");
}
for (const [number, match] of similar.matches.entries()) {
  const some = match.pairs.length < match.count ? ", the first " + match.pairs.length : "";
  const names = (pair) => pair.clips.map((clip) => clip.key + " " + clip.source).join(" ");
  const texts = match.pairs.map((pair) => pairText(pair) + " " + names(pair));
  const title = "Also in " + similar.other + ": " + match.reason;
  const section = addSection(title, many(match.count, "pair") + some, "pairs-" + number, texts, "pairs", () => (i) => {
    const sides = match.pairs[i].clips.map((clip) => figure(clip, clip.jpeg));
    return make("div", {}, quiet(pairText(match.pairs[i])), make("div", { className: "sides" }, ...sides));
  });
  section.damaged = match.pairs.map((pair) => pair.clips.some((clip) => clip.damage !== null));
}
for (const [number, one] of classes.entries()) {
  const link = make("a", { href: "#class-" + number, textContent: one.name });
  const entry = make("li", {}, link, make("span", { textContent: one.count.toLocaleString("en") }));
  byId("names").append(entry);
  if (!one.clips.length) {
    link.removeAttribute("href");
    continue;
  }
  const shown = (one.clips.length < one.count ? one.clips.length + " of " : "") + many(one.count, "clip");
  const texts = one.clips.map((clip) => one.name + " " + clip.key + " " + clip.source);
  const note = "label " + one.label + ", " + shown;
  const section = addSection(one.name, note, "class-" + number, texts, "", () => {
    const pictures = read("pictures-" + number);
    return (i) => figure(one.clips[i], pictures[i]);
  });
  section.damaged = one.clips.map((clip) => clip.damage !== null);
  section.entry = entry;
}

function filter() {
  const words = byId("query").value.toLowerCase().split(/\\s+/).filter(Boolean), only = byId("damaged").checked;
  let total = 0;
  for (const section of sections) {
    section.shown = [...section.entries.keys()].filter((i) => (!only || section.damaged[i]) &&
      words.every((word) => section.entries[i].toLowerCase().includes(word)));
    section.element.hidden = section.shown.length === 0;
    if (section.entry) { section.entry.hidden = section.element.hidden; total += section.shown.length; }
    section.near = false;
    section.list.replaceChildren();
    empty(section);
  }
  settle();
  byId("matching").textContent = words.length || only ? many(total, "clip") + " of those shown" : "";
}
// #q=surfing&damaged=1 asks for clips; #class-3 goes to a class, and leaves the search alone.
function fromAddress() {
  const address = location.hash.slice(1);
  if (!/^(q|damaged)=/.test(address)) return;
  const asked = new URLSearchParams(address);
  byId("query").value = asked.get("q") ?? "";
  byId("damaged").checked = asked.get("damaged") === "1";
  filter();
}
function toAddress() {
  const asked = new URLSearchParams();
  if (byId("query").value) asked.set("q", byId("query").value);
  if (byId("damaged").checked) asked.set("damaged", "1");
  history.replaceState(null, "", "#" + asked);
  filter();
}

byId("place").textContent = facts.place;
byId("totals").textContent = many(facts.clips, "clip") + " in " + classes.length + " classes, " +
  facts.shown.toLocaleString("en") + " shown; " + facts.failed + " failed, " + facts.damaged + " damaged";
if (matchMedia("(max-width: 50rem)").matches) byId("contents").open = false;
byId("query").addEventListener("input", toAddress);
byId("damaged").addEventListener("change", toAddress);
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", fromAddress);
filter();
fromAddress();
if (/^#(class|pairs)-\\d+$/.test(location.hash)) {
  document.querySelector(location.hash)?.scrollIntoView({ behavior: "instant" });
  settle();
}
for (const section of sections) observer.observe(section.element);
"""
