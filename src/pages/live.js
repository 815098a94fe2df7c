// Keeps the dashboard current: new moments on top of the list, and the connections as they change.
"use strict";

const KEPT = 100;
const FIELDS = ["at", "kind", "what", "outcome", "note", "route", "took"];
const LEVELS = ["good", "odd", "bad"];

const list = document.getElementById("recent");
const pattern = document.getElementById("moment").content;
const light = document.getElementById("live");
const pause = document.getElementById("pause");

let held = false;
let link = "connecting";
let coming = [];

function show() {
  light.textContent = held ? "paused" : link;
  light.className = "live " + (held ? "held" : link === "live" ? "on" : "off");
  pause.textContent = !held ? "Pause" : coming.length ? `Resume (${coming.length})` : "Resume";
}

function row(moment) {
  const copy = pattern.cloneNode(true);
  // What an agent sent is in here: text, never markup.
  for (const field of FIELDS) copy.querySelector(`[data-fill=${field}]`).textContent = moment[field] ?? "";
  copy.firstElementChild.className = `fresh ${LEVELS.includes(moment.level) ? moment.level : "odd"}`;
  return copy;
}

function flush() {
  if (held || !coming.length) return;
  list.querySelector(".none")?.remove();
  const fresh = coming.splice(0).reverse().map(row);
  list.prepend(...fresh);
  while (list.children.length > KEPT) list.lastElementChild.remove();
}

function take(moment) {
  coming.push(moment);
  if (coming.length > KEPT) coming.shift();
  if (held) show();
  else if (coming.length === 1) requestAnimationFrame(flush);
  if (moment.kind !== "request") refresh(300);
}

// The sections that the server knows better, fetched anew; one that is in use is left alone until it is not.
let due = 0;
function refresh(delay) {
  due ||= setTimeout(async () => {
    due = 0;
    try {
      const page = await fetch("/", { headers: { accept: "text/html" } });
      if (!page.ok) return;
      const next = new DOMParser().parseFromString(await page.text(), "text/html");
      for (const id of ["waiting", "connections"]) {
        const [old, now] = [document.getElementById(id), next.getElementById(id)];
        if (!now || old.isEqualNode(now)) continue;
        if (old.contains(document.activeElement) || old.querySelector("details[open]")) refresh(3000);
        else old.replaceWith(document.adoptNode(now));
      }
    } catch { /* The stream says when Sidebearer is back. */ }
  }, delay);
}

function listen() {
  const source = new EventSource("/events");
  source.onopen = () => { if (link === "reconnecting") refresh(0); link = "live"; show(); };
  source.onmessage = (event) => take(JSON.parse(event.data));
  source.onerror = () => {
    link = "reconnecting";
    show();
    // After an answer that is no stream, a browser does not try again by itself.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 5000);
  };
}

pause.onclick = () => { held = !held; flush(); show(); };
light.hidden = pause.hidden = false;
show();
listen();
setInterval(() => document.hidden || refresh(0), 60000); // "in 52 min" does not stay true

const exports = document.getElementById("exports");
if (exports && navigator.clipboard) {
  const copy = Object.assign(document.createElement("button"), { className: "button", type: "button", textContent: "Copy" });
  copy.onclick = async () => {
    copy.textContent = await navigator.clipboard.writeText(exports.textContent).then(() => "Copied", () => "Not copied: select the lines by hand");
    setTimeout(() => { copy.textContent = "Copy"; }, 2000);
  };
  exports.after(copy);
}
