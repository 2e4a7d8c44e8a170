"use strict";
// Keeps the page fresh: asks for the sections, and replaces those that have changed. All markup is made by the server.
const at = (id) => document.getElementById(id);
const seen = new Map();
let told = Date.now();

function replace(name, markup) {
  const place = at(`${name}-live`);
  if (place === null || seen.get(name) === markup) return;
  const pointed = place.matches(":hover") && place.querySelector("svg") !== null;
  const selected = !getSelection().isCollapsed && place.contains(getSelection().anchorNode);
  if (seen.has(name) && (pointed || selected)) return; // somebody reads it: the next time will do
  const open = [...place.querySelectorAll("details")].map((details) => details.open);
  const made = new DOMParser().parseFromString(markup, "text/html").body;
  place.replaceChildren(...made.childNodes);
  place.querySelectorAll("details").forEach((details, index) => { details.open = open[index] ?? false; });
  seen.set(name, markup);
}

async function refresh() {
  let again = 5;
  try {
    const answer = await fetch("/live.json", { cache: "no-store", signal: AbortSignal.timeout(10000) });
    if (!answer.ok) throw new Error(`the answer was ${answer.status}: ${await answer.text()}`);
    const live = await answer.json();
    for (const [name, markup] of Object.entries(live.sections)) replace(name, markup);
    document.title = live.title;
    again = live.again_s;
    told = Date.now();
    at("fresh").className = "";
    at("fresh").textContent = `As of ${new Date().toLocaleTimeString()}.`;
  } catch (error) {
    at("fresh").className = "stale";
    at("fresh").textContent = `Not fresh for ${Math.round((Date.now() - told) / 1000)} s: ${error.message}`;
  }
  setTimeout(refresh, document.hidden ? Math.max(again, 15) * 1000 : again * 1000);
}

document.documentElement.dataset.live = "yes";
refresh();
