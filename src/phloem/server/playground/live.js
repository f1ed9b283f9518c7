// The engine as it is now: asked for once a second while the page is looked at.

import { get } from "./api.js";

const EVERY = 1000;
const SPARKS = 60;
const byId = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const speeds = [];
let before = null;
let paused = false;
let timer = 0;

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? [String(Math.round(value * 1000)), "ms"] : [value.toFixed(2), "s"];
}

function show(id, value) {
  const at = byId(id);
  if (Array.isArray(value)) {
    const unit = document.createElement("small");
    unit.textContent = value[1];
    at.replaceChildren(value[0], unit);
  } else {
    at.textContent = value;
  }
}

/** Mean over what came since the last look; what was shown before when nothing came. */
function recent(now, then, last) {
  const count = now.count - (then?.count ?? 0);
  if (then && now.count < then.count) return null; // another server than before
  return count > 0 ? (now.sum - (then?.sum ?? 0)) / count : last;
}

const lately = { ttft: null, itl: null };

function showNumbers(view) {
  const { state, latency } = view;
  show("running", whole.format(state.running));
  show("waiting", whole.format(state.waiting));
  show("pixels", whole.format(Math.round(state.pixel_throughput ?? 0)));
  for (const name of ["ttft", "itl"]) lately[name] = recent(latency[name], before?.latency[name], lately[name]);
  show("ttft", seconds(lately.ttft));
  show("tpot", seconds(lately.itl));
  // Tokens since the last look: steadier than the engine's own figure, and 0 when it is idle.
  const elapsed = before ? view.time - before.time : 0;
  const made = before ? view.generated - before.generated : 0;
  const speed = elapsed > 0 && made >= 0 ? made / elapsed : 0;
  speeds.push(speed);
  if (speeds.length > SPARKS) speeds.shift();
  show("speed", whole.format(Math.round(speed)));
  const top = Math.max(...speeds, 1);
  const points = speeds.map((value, i) => `${(120 * (i + SPARKS - speeds.length)) / (SPARKS - 1)},${27 - (26 * value) / top}`);
  byId("spark").firstElementChild.setAttribute("points", points.join(" "));
  show("hits", [(100 * state.cache_hit_rate).toFixed(1), "%"]);
}

function showMemory(state) {
  const total = state.total_tokens;
  // What is in use and what is only cached; cached tokens count as available to the engine.
  const used = state.used_tokens;
  const cached = state.evictable_tokens;
  byId("memory-used").style.width = `${(100 * used) / total}%`;
  byId("memory-cached").style.width = `${(100 * cached) / total}%`;
  byId("memory-text").textContent =
    `${whole.format(used)} tokens in use, ${whole.format(cached)} cached, of ${whole.format(total)}`;
}

// --- the tree

const items = new Map(); // node id -> {li, ul, seen}
const opened = new Map(); // node id -> whether it is open, where the reader has said so
let detailed = null;
let chosen = null; // node id that was focused last

function make(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function makeItem(id) {
  const li = document.createElement("li");
  li.setAttribute("role", "treeitem");
  li.tabIndex = -1;
  li.dataset.id = id;
  const row = make("div", "node");
  const parts = {
    turner: make("span", "turner"), text: document.createElement("code"), tokens: make("span", "badge"),
    hits: make("span", "badge hit"), locks: make("span", "badge lock"), share: make("i", "share"),
  };
  parts.turner.setAttribute("aria-hidden", "true");
  row.append(...Object.values(parts));
  const about = make("div", "about");
  about.hidden = true;
  const ul = document.createElement("ul");
  ul.setAttribute("role", "group");
  li.append(row, about, ul);
  row.addEventListener("click", () => { focusItem(li); detail(li); });
  parts.turner.addEventListener("click", (event) => { event.stopPropagation(); focusItem(li); open(li, !isOpen(li)); });
  return { li, ul, row, about, parts, data: null };
}

function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(no text)";
}

function fill(item, data, largest) {
  const { parts, li } = item;
  if (item.data && data.hits > item.data.hits) {
    li.classList.remove("struck");
    void li.offsetWidth; // begin the animation again
    li.classList.add("struck");
  }
  item.data = data;
  parts.text.textContent = visible(data.text);
  parts.tokens.textContent = `${whole.format(data.tokens)} tok`;
  parts.hits.textContent = data.hits === 1 ? "1 hit" : `${whole.format(data.hits)} hits`;
  parts.locks.textContent = data.locks === 1 ? "1 lock" : `${data.locks} locks`;
  parts.locks.hidden = !data.locks;
  parts.share.style.width = `${Math.max(2, (100 * data.tokens) / largest)}%`;
  li.classList.toggle("locked", data.locks > 0);
  li.setAttribute("aria-label",
    `${data.text}, ${data.tokens} tokens, ${parts.hits.textContent}, ${parts.locks.textContent}, ${data.children} children`);
  if (!item.about.hidden) fillAbout(item);
}

function fillAbout(item) {
  const { data } = item;
  const facts = document.createElement("code");
  facts.textContent = `${data.text}${data.first_ids.length < data.tokens ? " …" : ""}`;
  const last = data.start + data.tokens - 1;
  const place = `Tokens ${whole.format(data.start)} to ${whole.format(last)} of prompts that begin like this; ` +
    `${data.children} ${data.children === 1 ? "branch" : "branches"} behind it. `;
  const held = data.locks ? `Held by ${data.locks} running or locked branches. ` : "Nobody holds it: it may be evicted. ";
  const space = data.namespace ? `Namespace ${data.namespace}. ` : "";
  item.about.replaceChildren(facts, place, held, space, `First token ids: ${data.first_ids.join(", ")}`);
}

const isOpen = (li) => li.getAttribute("aria-expanded") !== "false";

function open(li, wanted) {
  if (!li.hasAttribute("aria-expanded")) return;
  opened.set(li.dataset.id, wanted);
  li.setAttribute("aria-expanded", String(wanted));
}

function detail(li) {
  const item = items.get(li.dataset.id);
  const hidden = !item.about.hidden;
  if (detailed && detailed !== item) detailed.about.hidden = true;
  item.about.hidden = hidden;
  detailed = item;
  if (!hidden) fillAbout(item);
}

/** One item of a tree takes part in tabbing: the one that was focused last, or the first. */
function rove() {
  if (!items.has(chosen)) chosen = null;
  const first = byId("tree").querySelector("li");
  for (const [id, item] of items) item.li.tabIndex = id === chosen || (chosen === null && item.li === first) ? 0 : -1;
}

function focusItem(li) {
  chosen = li.dataset.id;
  rove();
  li.focus();
}

function shown() {
  return [...byId("tree").querySelectorAll("li")].filter((li) => !li.parentElement.closest('li[aria-expanded="false"]'));
}

function onKey(event) {
  const li = event.target.closest("li");
  if (!li || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = shown();
  const at = all.indexOf(li);
  const parent = li.parentElement.closest("li");
  const moves = {
    ArrowDown: () => all[at + 1], ArrowUp: () => all[at - 1], Home: () => all[0], End: () => all[all.length - 1],
    ArrowRight: () => {
      if (!li.hasAttribute("aria-expanded")) return null;
      if (isOpen(li)) return items.get(li.dataset.id).ul.firstElementChild;
      open(li, true);
      return null;
    },
    ArrowLeft: () => {
      if (li.hasAttribute("aria-expanded") && isOpen(li)) {
        open(li, false);
        return null;
      }
      return parent;
    },
    Enter: () => { detail(li); return null; },
    " ": () => { detail(li); return null; },
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const next = moves[event.key]();
  if (next) focusItem(next);
}

function showTree(tree) {
  const root = byId("tree");
  const focused = document.activeElement?.closest("#tree li");
  const nodes = tree?.nodes ?? [];
  const known = new Set(nodes.map((data) => String(data.id)));
  for (const [id, item] of items) {
    if (!known.has(id)) {
      if (item === detailed) detailed = null;
      item.li.remove();
      items.delete(id);
      opened.delete(id);
    }
  }
  const largest = Math.max(1, ...nodes.map((data) => data.tokens));
  const places = new Map(); // list -> how many of its children are in place
  for (const data of nodes) {
    const id = String(data.id);
    if (!items.has(id)) items.set(id, makeItem(id));
    const item = items.get(id);
    const parent = items.get(String(data.parent))?.ul ?? root;
    const place = places.get(parent) ?? 0;
    if (parent.children[place] !== item.li) parent.insertBefore(item.li, parent.children[place] ?? null);
    places.set(parent, place + 1);
    fill(item, data, largest);
  }
  for (const item of items.values()) {
    const inner = item.ul.children.length > 0;
    item.parts.turner.textContent = inner ? "›" : "·";
    if (inner) item.li.setAttribute("aria-expanded", String(opened.get(item.li.dataset.id) ?? true));
    else item.li.removeAttribute("aria-expanded");
  }
  rove();
  if (focused && focused !== document.activeElement && focused.isConnected) focused.focus(); // it was moved
  byId("tree-empty").hidden = nodes.length > 0;
  let text = "";
  if (tree && !tree.enabled) text = "the cache is switched off";
  else if (tree) {
    const more = tree.num_nodes > nodes.length ? ` (${whole.format(nodes.length)} shown)` : "";
    text = `${whole.format(tree.num_nodes)} ${tree.num_nodes === 1 ? "node" : "nodes"}${more}, ${whole.format(tree.cached_tokens)} tokens`;
  }
  byId("tree-text").textContent = text;
}

// --- asking

export function status(kind, text) {
  byId("status").className = `status ${kind}`;
  byId("status-text").textContent = kind === "gone" ? "not available" : text;
  byId("live").classList.toggle("stale", kind === "gone"); // what it shows is from before
  const banner = byId("banner");
  banner.hidden = kind !== "gone";
  if (kind === "gone") banner.textContent = text;
}

async function look() {
  clearTimeout(timer);
  if (paused || document.hidden) return;
  try {
    const view = await get("/playground/live");
    if (view.status === "ready") status("ready", view.state.paused ? "paused" : "ready");
    else status("gone", `The engine is not available: ${view.status}`);
    showNumbers(view);
    if (view.state.total_tokens) showMemory(view.state);
    if (view.tree) showTree(view.tree);
    const late = !view.tree && view.status === "ready" && !document.querySelector("main.draws"); // which has no tree
    byId("live-note").textContent = late ? "the engine is busy; the tree is from before" : "";
    before = view;
  } catch (error) {
    if (error.status === 401) status("", "needs a key");
    else status("gone", error.message);
  }
  timer = setTimeout(look, EVERY);
}

export function start() {
  byId("tree").addEventListener("keydown", onKey);
  byId("pause").addEventListener("click", (event) => {
    paused = !paused;
    event.target.setAttribute("aria-pressed", String(paused));
    look();
  });
  document.addEventListener("visibilitychange", look);
  look();
}

export { look };
