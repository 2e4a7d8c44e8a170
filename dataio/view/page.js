"use strict";
// Everything shown is set as text: what a document holds is never read as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const LISTED = 500;

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const documents = data.documents.map((shown, index) => ({ ...shown, index }));
const byId = new Map(documents.map((shown) => [`${shown.source}/${shown.id}`, shown]));
const inputs = ["query", "source", "language", "state"].map(at);
let current = null;

function choices(select, every, values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  select.append(element("option", { value: "" }, every));
  for (const value of [...counts.keys()].sort())
    select.append(element("option", { value }, `${value} (${number(counts.get(value))})`));
}

const position = (query) => (/^[\d,]+$/.test(query) ? Number(query.replaceAll(",", "")) : null);
const holds = (shown, token) => shown.tokens !== undefined && shown.start <= token && token < shown.stop;
const state = (shown) => shown.dropped ?? "kept";

function matches(shown) {
  const query = at("query").value.trim().toLowerCase();
  const token = position(query);
  return (at("source").value === "" || shown.source === at("source").value)
    && (at("language").value === "" || shown.language === at("language").value)
    && (at("state").value === "" || state(shown) === at("state").value)
    && (query === "" || shown.id.startsWith(query) || shown.path.toLowerCase().includes(query)
      || (token !== null && holds(shown, token)));
}

function item(shown) {
  const name = shown.path || `document ${number(shown.number)}`;
  const size = shown.tokens ? `${number(shown.stop - shown.start)} tokens` : "";
  const about = [shown.source, shown.language, size].filter(Boolean).join(" · ");
  const small = element("small", {}, about);
  if (shown.dropped) small.append(" · ", element("span", { class: "bad" }, shown.dropped));
  const button = element("button", { type: "button", "data-index": shown.index }, element("b", {}, name), small);
  button.addEventListener("click", () => open(shown));
  return element("li", {}, button);
}

function list() {
  const found = documents.filter(matches);
  at("list").replaceChildren(...found.slice(0, LISTED).map(item));
  const cut = found.length > LISTED ? `, the first ${LISTED} of which are listed` : "";
  const token = position(at("query").value.trim());
  const hint = found.length === 0 && token !== null
    ? " Most documents are not on this page: stoker data view STORE --token shows any." : "";
  at("count").textContent = `${number(found.length)} documents${cut}.${hint}`;
  if (found.length > 0 && !found.includes(current)) open(found[0]);
  else mark();
}

function mark() {
  for (const button of at("list").querySelectorAll("button")) {
    if (current !== null && Number(button.dataset.index) === current.index) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

function open(shown) {
  current = shown;
  history.replaceState(null, "", `#${encodeURIComponent(shown.source)}/${shown.id}`);
  at("document").replaceChildren(...content(shown));
  at("document").scrollTop = 0;
  mark();
  at("document").querySelector(".found")?.scrollIntoView({ block: "center" });
}

function content(shown) {
  const parts = [element("h2", {}, shown.path || `Document ${number(shown.number)}`)];
  const look = shown.dropped ? "why bad" : shown.stages.length ? "why good" : "why";
  parts.push(element("p", { class: look }, shown.why));
  const facts = [["source", shown.source], ["language", shown.language], ["id", shown.id]];
  if (shown.tokens) {
    facts.push(["document", number(shown.number)]);
    facts.push(["tokens", `${number(shown.start)} to ${number(shown.stop - 1)}`]);
    facts.push(["size", `${number(shown.stop - shown.start)} tokens, ${number(shown.bytes)} bytes`]);
  } else if (shown.bytes) facts.push(["size", `${number(shown.bytes)} bytes`]);
  facts.push(...shown.facts);
  parts.push(element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])));
  if (shown.copies.length > 0) parts.push(element("h3", {}, `Near-duplicates, a cluster of ${shown.size}`), copies(shown));
  parts.push(element("h3", {}, shown.tokens ? "Text, token by token" : shown.cut ? "How the text begins" : "Text"), text(shown));
  if (shown.tokens) {
    const left = shown.stop - shown.start - shown.tokens.reduce((sum, tokens) => sum + tokens.length, 0);
    if (left > 0) parts.push(element("p", { class: "soft" }, `… and ${number(left)} tokens more`));
  }
  const measured = shown.stages.filter(([, values]) => values.length > 0);
  if (measured.length > 0)
    parts.push(element("details", { open: "" }, element("summary", {}, "What the stages found"), stages(measured)));
  return parts;
}

function stages(measured) {
  const rows = measured.flatMap(([stage, values]) => values.map(([name, value], row) => element("tr", {},
    element("th", {}, row === 0 ? stage : ""), element("td", {}, name), element("td", {}, value))));
  return element("div", { class: "scroll" }, element("table", {}, element("tbody", {}, ...rows)));
}

function copies(shown) {
  const rows = shown.copies.map((copy) => {
    const other = byId.get(`${copy.source}/${copy.id}`);
    const name = element("td", {}, copy.path);
    if (other !== undefined) {
      const link = element("a", { href: "#" }, copy.path);
      link.addEventListener("click", (event) => { event.preventDefault(); open(other); });
      name.replaceChildren(link);
    }
    return element("tr", {}, element("th", {}, copy.id.slice(0, 12)), element("td", {}, copy.source), name,
      element("td", { class: copy.kept ? "good" : "bad" }, copy.kept ? "kept" : "not kept"));
  });
  return element("div", { class: "scroll" }, element("table", {}, element("tbody", {}, ...rows)));
}

function text(shown) {
  const block = element("pre", {});
  if (!shown.tokens) {
    block.textContent = shown.text;
    return block;
  }
  const token = position(at("query").value.trim());
  let first = shown.start;
  shown.tokens.forEach((tokens, index) => {
    const last = first + tokens.length - 1;
    const where = last > first ? `${number(first)} to ${number(last)}` : number(first);
    const piece = element("span", { title: `token ${where}, id ${tokens.join(" ")}` });
    shown.texts[index].split("\n").forEach((line, place) => {
      if (place > 0) piece.append(element("i", {}, "⏎"), "\n");
      piece.append(line);
    });
    if (token !== null && first <= token && token <= last) piece.className = "found";
    block.append(piece);
    first = last + 1;
  });
  return block;
}

function step(event) {
  if ((event.key !== "ArrowDown" && event.key !== "ArrowUp") || event.target.tagName === "SELECT") return;
  if (event.target.closest("main")) return;
  const found = documents.filter(matches).slice(0, LISTED);
  const next = found[found.indexOf(current) + (event.key === "ArrowDown" ? 1 : -1)];
  if (next === undefined) return;
  event.preventDefault();
  open(next);
  at("list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}

function start() {
  choices(at("source"), "Sources", documents.map((shown) => shown.source));
  choices(at("language"), "Languages", documents.map((shown) => shown.language));
  choices(at("state"), "Decisions", documents.map(state));
  at("summary").textContent = data.stores.map((store) =>
    `${store.source}: ${number(store.documents)} documents, ${number(store.tokens)} tokens, data set ${store.dataset}`,
  ).join("; ") + ". A sample of them is here.";
  for (const input of inputs) input.addEventListener("input", list);
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", step);
  let wanted = "";
  try { wanted = decodeURIComponent(location.hash.slice(1)); } catch { /* not one of ours */ }
  current = byId.get(wanted) ?? null;
  if (current !== null) open(current);
  list();
  at("list").querySelector("[aria-current]")?.scrollIntoView({ block: "center" });
}

start();
