// The pools: a tile for each worker with its load, its KV blocks by state and its requests.

import { BLOCK_STATES } from "./store.js";
import { count, h, ms, plural, say, tail, words } from "./elements.js";

const ROLES = ["prefill", "decode", "mixed"];
const ROOMY_MAX = 24; // workers; more are shown densely
const ROWS_MAX = 6;
const PIPS_MAX = 24;

export class Pools {
  constructor(element, store, onWorker) {
    this.element = element;
    this.store = store;
    this.onWorker = onWorker;
    this.tiles = new Map();
    this.pools = new Map();
    this.legend = null;
    this.dense = false;
  }

  /** Where arcs begin and end. */
  tile(id) {
    return this.tiles.get(id)?.element ?? null;
  }

  render(changed) {
    const dense = this.store.workers.size > ROOMY_MAX;
    const newcomers = [...changed.workers].some((id) => this.tiles.get(id)?.role !== this.store.workers.get(id)?.role);
    if (changed.all || newcomers || dense !== this.dense) this.#build(dense);
    for (const id of changed.workers) this.#draw(id);
    for (const id of changed.homes) this.#drawRequests(id);
    for (const [role, pool] of this.pools) this.#summary(role, pool);
  }

  /** Counters of tokens go on without any other change. */
  renderTokens() {
    if (this.dense) return;
    for (const tile of this.tiles.values())
      for (const [request, node] of tile.counters ?? []) say(node, progress(this.store.requests.get(request)));
  }

  #build(dense) {
    this.dense = dense;
    this.element.classList.toggle("dense", dense);
    for (const part of this.element.querySelectorAll(".pool, .legend, .empty")) part.remove();
    const kept = this.element.ownerDocument.activeElement?.dataset?.worker;
    this.tiles.clear();
    this.pools.clear();
    const workers = [...this.store.workers.values()].sort(byName);
    if (!workers.length) {
      const none = "No worker has joined this router yet. They come by themselves; `tandem logs` says what they do.";
      this.element.append(h("p", { class: "empty card" }, none));
      return;
    }
    for (const role of ROLES) {
      const here = workers.filter((each) => each.role === role);
      if (here.length) this.element.append(this.#pool(role, here));
    }
    this.legend ??= legend();
    this.element.append(this.legend);
    for (const id of this.tiles.keys()) {
      this.#draw(id);
      this.#drawRequests(id);
    }
    if (kept) this.tiles.get(kept)?.name.focus();
  }

  #pool(role, workers) {
    const note = h("span", { class: "quiet" });
    const tiles = h("div", { class: "tiles" }, workers.map((each) => this.#tile(each)));
    this.pools.set(role, { note, shown: "" });
    return h("section", { class: "pool", "data-role": role, "aria-label": `${role} workers` },
      h("header", {}, h("h2", {}, role), note), tiles);
  }

  #tile(worker) {
    const tile = {
      role: worker.role,
      name: h("button", { type: "button", class: "plain", "data-worker": worker.id, click: () => this.onWorker(worker.id) }, worker.id),
      state: h("span", { class: "state" }),
      load: h("span", { class: "load" }),
      run: h("b", {}, "0"),
      wait: h("span", {}),
      bar: h("div", { class: "kv", "aria-hidden": true }),
      used: h("span", {}),
      step: h("span", {}),
      requests: h("div", { class: this.dense ? "pips" : "mini" }),
      painted: "",
      listed: "",
      counters: [],
    };
    tile.load.append(tile.run, " run", tile.wait);
    tile.element = h("article", { class: "tile", "data-state": worker.state },
      h("header", {}, h("i", {}), tile.name, tile.state, tile.load),
      tile.bar, h("div", { class: "facts" }, tile.used, tile.step), tile.requests);
    this.tiles.set(worker.id, tile);
    return tile.element;
  }

  #draw(id) {
    const worker = this.store.workers.get(id), tile = this.tiles.get(id);
    if (!worker || !tile) return;
    if (tile.element.dataset.state !== worker.state) {
      tile.element.dataset.state = worker.state;
      say(tile.state, worker.state);
      tile.name.title = worker.reason || worker.state;
    }
    say(tile.run, String(worker.running));
    say(tile.wait, worker.waiting ? ` · ${worker.waiting} wait` : "");
    const painted = barOf(worker);
    if (painted !== tile.painted) {
      tile.painted = painted;
      tile.bar.style.backgroundImage = painted;
    }
    if (this.dense) return;
    const inUse = worker.total - worker.free - worker.cached;
    say(tile.used, `KV ${percent(inUse, worker.total)} of ${count(worker.total)}, ${percent(worker.cached, worker.total)} cached`);
    const alarm = worker.audit > 0;
    tile.step.classList.toggle("alarm", alarm);
    say(tile.step, alarm ? `audit: ${plural(worker.audit, "finding")}` : worker.step_ms === null ? "" : `step ${ms(worker.step_ms)}`);
  }

  #drawRequests(id) {
    const worker = this.store.workers.get(id), tile = this.tiles.get(id);
    if (!worker || !tile) return;
    const running = this.store.running(worker);
    const listed = running.map((each) => `${each.handle}${pipOf(each)}`).join();
    if (listed === tile.listed) return;
    tile.listed = listed;
    tile.counters = [];
    if (this.dense) {
      tile.requests.replaceChildren(...running.slice(0, PIPS_MAX).map((each) => h("i", { "data-pip": pipOf(each) })));
      return;
    }
    const rows = running.slice(-ROWS_MAX).map((each) => {
      const counter = h("span", { class: "quiet" }, progress(each));
      tile.counters.push([each.handle, counter]);
      return h("a", { href: `#/request/${encodeURIComponent(each.id)}`, "data-pip": pipOf(each), title: `${each.id}: ${words(pipOf(each))}` },
        h("i", {}), h("span", { class: "mono" }, tail(each.id)), counter);
    });
    const more = running.length - rows.length;
    tile.requests.replaceChildren(...rows, ...(more > 0 ? [h("span", { class: "more" }, `and ${plural(more, "more request")}`)] : []));
  }

  #summary(role, pool) {
    let ready = 0, all = 0, running = 0, waiting = 0, total = 0, used = 0;
    for (const worker of this.store.workers.values()) {
      if (worker.role !== role) continue;
      all += 1;
      ready += worker.state === "ready";
      if (worker.state === "dead" || worker.state === "left") continue;
      running += worker.running;
      waiting += worker.waiting;
      total += worker.total;
      used += worker.total - worker.free - worker.cached;
    }
    say(pool.note, `${ready} of ${all} ready · ${plural(running, "request")} in batches${waiting ? ` · ${count(waiting)} waiting` : ""} · KV ${percent(used, total)} in use`);
  }
}

/** What colour a request has: where it is in its life, or that it moves. */
export function pipOf(request) {
  return request.moving_to ? "moving" : request.state;
}

export function percent(part, whole) {
  return whole ? `${Math.round((100 * part) / whole)} %` : "–";
}

function progress(request) {
  if (!request) return "";
  if (request.state === "prefilling" || request.state === "admitted") return `prompt ${count(request.prompt_tokens)}`;
  return request.max_tokens ? `${count(request.tokens)} / ${count(request.max_tokens)}` : count(request.tokens);
}

/** The bar as one picture: a single style to set, and nothing to lay out. In half percents, which is what can be seen. */
export function barOf(worker) {
  let at = 0;
  const stops = [];
  for (const state of BLOCK_STATES.slice(0, -1)) {
    if (!worker[state]) continue;
    const end = at + Math.max(0.5, Math.round((200 * worker[state]) / worker.total) / 2);
    stops.push(`var(--${state}) ${at}% ${end}%`);
    at = end;
  }
  return stops.length ? `linear-gradient(90deg, ${stops.join(", ")}, var(--free) ${at}%)` : "none";
}

function byName(one, other) {
  return one.id.localeCompare(other.id, "en", { numeric: true });
}

function legend() {
  const blocks = BLOCK_STATES.map((state) => [state, `var(--${state})`]);
  const requests = [["prefilling", "var(--prefill)"], ["handing off", "var(--exported)"], ["decoding", "var(--decode)"], ["moving", "var(--granted)"]];
  const items = (pairs) => pairs.map(([name, colour]) => h("span", {}, h("i", { style: { "--c": colour } }), name));
  return h("p", { class: "legend" }, h("b", {}, "KV blocks"), items(blocks), h("b", {}, "requests"), items(requests));
}
