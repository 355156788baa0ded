"""The service's page: drop a video, see its classes and the frames that were looked at."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vidcls</title>
<style>
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --text: #1d1f21; --quiet: #5d6368; --line: #cfd4d8;
  --bar: #3b6ea5; --bad: #a3261b; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181a; --card: #202326; --text: #e6e8ea; --quiet: #a3abb2;
  --line: #3d4348; --bar: #6ea3dc; --bad: #ff9c8f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
  background: var(--ground); color: var(--text); }
h1 { font-size: 1.3rem; margin: .2rem 0; } p { margin: .3rem 0; } .quiet { color: var(--quiet); }
#drop { display: block; margin: 1rem 0; padding: 2.5rem 1rem; text-align: center; background: var(--card);
  border: 2px dashed var(--line); border-radius: 12px; cursor: pointer; }
#drop.over, #drop:focus-within { border-color: var(--bar); }
#drop input { display: block; margin: .8rem auto 0; max-width: 100%; }
#answer img { width: 100%; height: auto; border-radius: 8px; display: block; margin: .6rem 0; }
ol { list-style: none; margin: .6rem 0; padding: 0; }
li { display: grid; grid-template-columns: 4.2rem 1fr; gap: .6rem; align-items: center; margin: .35rem 0; }
li b { text-align: right; font-weight: 600; font-variant-numeric: tabular-nums; }
.track { position: relative; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  min-height: 2rem; }
.track i { position: absolute; inset: 0 auto 0 0; background: var(--bar); opacity: .35; border-radius: 5px; }
.track span { position: relative; display: block; padding: .2rem .5rem; overflow-wrap: anywhere; }
.bad { color: var(--bad); } [hidden] { display: none; }
</style>
<h1>What is done in this video?</h1>
<p class="quiet" id="about"></p>
<label id="drop">Drop a video here, or choose one<input type="file" id="file" accept="video/*"></label>
<p id="status" role="status"></p>
<section id="answer" hidden><h2 id="name"></h2>
<img id="frames" alt="frames that the model looked at"><ol id="top"></ol></section>
<script>
"use strict";
const byId = (id) => document.getElementById(id);
fetch("health").then((answer) => answer.json()).then((about) => {
  byId("about").textContent = about.classes + " classes, head " + about.head;
});
async function send(file) {
  byId("answer").hidden = true;
  byId("status").className = "";
  byId("status").textContent = "Looking at " + file.name + " \\u2026";
  const form = new FormData();
  form.append("video", file);
  let answer, told;
  try {
    answer = await fetch("predict?frames=true", { method: "POST", body: form });
    told = await answer.json();
  } catch (error) {
    answer = { ok: false }; told = { error: "the service does not answer: " + error.message };
  }
  if (!answer.ok) {
    byId("status").className = "bad";
    byId("status").textContent = file.name + ": " + (told.error || "the service failed");
    return;
  }
  byId("status").textContent = told.seconds.toFixed(1) + " s";
  byId("name").textContent = told.video;
  byId("frames").src = "data:image/jpeg;base64," + told.frames;
  byId("top").replaceChildren(...told.top.map((one) => {
    const [row, share, track, bar, name] = ["li", "b", "div", "i", "span"].map((tag) => document.createElement(tag));
    share.textContent = (100 * one.score).toFixed(1) + "\\u00a0%";
    bar.style.width = 100 * one.score + "%";
    name.textContent = one.class;
    track.className = "track";
    track.append(bar, name);
    row.append(share, track);
    return row;
  }));
  byId("answer").hidden = false;
}
byId("file").onchange = () => { if (byId("file").files.length) send(byId("file").files[0]); };
const drop = byId("drop");
for (const name of ["dragover", "dragenter"])
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const name of ["dragleave", "drop"])
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("over"); });
drop.addEventListener("drop", (event) => { if (event.dataTransfer.files.length) send(event.dataTransfer.files[0]); });
</script>
</html>
"""
