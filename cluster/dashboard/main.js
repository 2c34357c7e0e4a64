// Puts the page together: frames to the store, changes to what shows them, and the state of the connection to people.

import { scale, signIn, toast } from "./actions.js";
import { Arcs } from "./arcs.js";
import { Charts } from "./charts.js";
import { clock, h, say, tail } from "./elements.js";
import { Feed, hasKey, takeKey } from "./feed.js";
import { Lists } from "./lists.js";
import { Pools } from "./pools.js";
import { RecordPanel } from "./record.js";
import { OtherFormat, Store } from "./store.js";
import { WorkerPanel } from "./worker.js";

const SPOKEN_MS = 2500;
const LISTS_MS = 950;
const element = (id) => document.getElementById(id);

/** The panel at the side: one request or one worker. It gives the focus back where it came from. */
class Drawer {
  constructor() {
    this.element = element("drawer");
    this.onClose = null;
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !this.element.hidden && !element("dialog").open) location.hash = "";
    });
  }

  show(title, actions, body, onClose) {
    this.onClose?.();
    this.onClose = onClose;
    if (this.element.hidden) this.before = document.activeElement;
    const close = h("button", { type: "button", "aria-label": "Close", click: () => { location.hash = ""; } }, "Close");
    this.element.replaceChildren(h("header", {}, h("h2", { id: "drawer-title", class: "mono" }, title), h("span", { class: "grow" }), close),
      h("section", {}, actions), body);
    this.element.hidden = false;
    this.element.scrollTop = 0;
    this.element.focus();
  }

  hide() {
    if (this.element.hidden) return;
    this.onClose?.();
    this.onClose = null;
    this.element.hidden = true;
    this.element.replaceChildren();
    if (this.before?.isConnected) this.before.focus();
  }
}

const store = new Store();
const drawer = new Drawer();
const pools = new Pools(element("pools"), store, (id) => { location.hash = `#/worker/${encodeURIComponent(id)}`; });
const arcs = new Arcs(element("pools"), pools);
const charts = new Charts(element("charts"), store);
const lists = new Lists(store);
const record = new RecordPanel(store, drawer);
const panel = new WorkerPanel(store, drawer);
const seen = { router: "", since: 0, lost: false, lists: 0, spoken: -Infinity, unspoken: -Infinity, asking: false };

function onFrame(frame) {
  let changed;
  try {
    changed = store.apply(frame);
  } catch (error) {
    if (error instanceof OtherFormat) return banner(error.message, "lost");
    throw error;
  }
  element("main").dataset.stale = "false";
  element("main").dataset.frame = frame.number;
  if (frame.head || changed.all) onHead();
  pools.render(changed);
  if (frame.tokens) pools.renderTokens();
  if (changed.all) arcs.clear();
  for (const [before, move] of changed.moves) if (!changed.all || move.outcome === "moving") onMove(before, move, changed.all);
  for (const request of changed.handoffs) arcs.handoff(request);
  const slow = changed.all || frame.at_ms - seen.lists >= LISTS_MS;
  if (slow) seen.lists = frame.at_ms;
  if (slow) lists.renderRequests();
  if (slow || changed.moves.length) lists.renderFigures();
  if (changed.moves.length || changed.all || frame.moves_gone) lists.renderMoves();
  if (frame.tasks || changed.all) lists.renderTasks();
  if (frame.seconds || changed.all) charts.render();
  if (slow) panel.render();
  record.controls?.update();
}

/** `old`: it is part of a first look, and nobody needs to hear of it. */
function onMove(before, move, old) {
  if (before && before.outcome === move.outcome) return;
  arcs.move(move);
  if (old || move.outcome === "moving") return;
  const now = performance.now();
  if (now - seen.spoken < SPOKEN_MS) {
    seen.unspoken += 1;
    return;
  }
  const went = { moved: `moved from ${move.from} to ${move.to}, ${move.reason}`, failed: `was not moved to ${move.to}`, ended: "ended while it moved" }[move.outcome];
  say(element("told"), `Request ${tail(move.request)} ${went}${seen.unspoken ? `; ${seen.unspoken} other moves` : ""}`);
  seen.spoken = now;
  seen.unspoken = 0;
}

function onHead() {
  const head = store.head;
  say(element("model"), head.model ?? "");
  const others = (head.routers ?? []).filter(([name]) => name !== head.router);
  const view = element("view");
  view.hidden = false;
  view.title = "Workers, charts and latencies as this router sees them; requests and moves of all routers that answer.";
  view.replaceChildren(`view of ${head.router}`, ...others.map(([name, up]) => h("span", { class: up ? "quiet" : "down" }, ` · ${name}${up ? "" : " does not answer"}`)));
  if (seen.router && seen.router !== head.router) toast(`This is ${head.router}'s view now; it was ${seen.router}'s.`, "note");
  else if (seen.since && seen.since !== head.since_ms) toast(`Connected again: ${head.router} was started again at ${clock(head.since_ms)}.`, "note");
  else if (seen.lost) toast(`Connected again to ${head.router}.`, "note");
  seen.router = head.router;
  seen.since = head.since_ms;
  seen.lost = false;
  banner(head.not_ready ? `The cluster does not serve: ${head.not_ready}` : "");
  element("scale").hidden = false;
  element("key").hidden = !hasKey();
  document.title = `Tandem · ${head.router}`;
}

function banner(text, kind = "") {
  const box = element("banner");
  box.hidden = !text;
  box.dataset.kind = kind;
  say(box, text);
}

async function onState(state, words, retryMs) {
  const link = element("link");
  if (state !== "connecting" || link.dataset.state !== "lost") {
    link.dataset.state = state;
    say(element("link-text"), state === "lost" ? "connection lost" : state === "refused" ? "signed out" : words);
  }
  if (state === "lost") {
    seen.lost = seen.router !== "";
    element("main").dataset.stale = "true";
    const heard = store.atMs ? ` What you see is as of ${clock(store.atMs)}.` : "";
    banner(`${words[0].toUpperCase()}${words.slice(1)}. Trying again in ${Math.round(retryMs / 100) / 10} s.${heard}`, "lost");
  }
  if (state === "refused") await onRefused(words);
}

async function onRefused(words) {
  element("main").dataset.stale = "true";
  element("scale").hidden = element("key").hidden = true;
  banner(words, "lost");
  if (seen.asking) return;
  seen.asking = true;
  const why = hasKey() ? words : "This cluster asks for API keys. The dashboard needs an operator's.";
  const key = await signIn(why);
  seen.asking = false;
  if (key) {
    takeKey(key);
    feed.start();
    return;
  }
  element("key").hidden = false;
  say(element("key"), "Sign in");
}

function signOut() {
  takeKey("");
  location.hash = "";
  for (const part of [store, arcs]) part.clear();
  pools.render({ all: true, workers: new Set(), homes: new Set() });
  for (const render of ["renderRequests", "renderMoves", "renderFigures", "renderTasks"]) lists[render]();
  charts.render();
  say(element("key"), "Sign out");
  feed.start();
}

function onHash() {
  const [, kind, name] = location.hash.split("/");
  let id = "";
  try {
    id = decodeURIComponent(name ?? "");
  } catch {
    id = ""; // somebody's own address: there is nothing of that name
  }
  if (kind === "request" && id) record.open(id);
  else if (kind === "worker" && id) panel.open(id);
  else drawer.hide();
}

const feed = new Feed({ onFrame, onState });
element("scale").addEventListener("click", () => scale(store));
element("key").addEventListener("click", () => (hasKey() ? signOut() : feed.start()));
addEventListener("hashchange", onHash);
addEventListener("online", () => feed.start());
feed.start();
onHash();
