// The figures at the top, and the lists: requests, moves, and what operators began.

import { OVER } from "./store.js";
import { age, bytes, clock, count, h, ms, plural, say, tail, words } from "./elements.js";
import { percent, pipOf } from "./pools.js";

const REQUESTS_MAX = 40;
const MOVES_MAX = 60;

export class Lists {
  constructor(store) {
    this.store = store;
    this.filter = document.getElementById("filter");
    this.filter.addEventListener("input", () => this.renderRequests());
    this.body = document.getElementById("requests");
    this.rows = new Map();
    this.figures = new Map();
    this.shownMoves = "";
    this.shownTasks = "";
  }

  renderFigures() {
    const store = this.store;
    let ready = 0, running = 0, waiting = 0, total = 0, used = 0, moving = 0;
    for (const worker of store.workers.values()) {
      ready += worker.state === "ready";
      if (worker.state === "dead" || worker.state === "left") continue;
      total += worker.total;
      used += worker.total - worker.free - worker.cached;
    }
    for (const request of store.requests.values()) {
      running += !OVER.has(request.state);
      waiting += request.state === "admitted";
      moving += Boolean(request.moving_to);
    }
    const last = store.seconds.slice(-10);
    const first = last.filter((each) => each.ttft_num);
    const tokens = last.length ? last.reduce((sum, each) => sum + each.tokens, 0) / last.length : 0;
    this.#figure("workers ready", count(ready), `of ${store.workers.size}`);
    this.#figure("requests", count(running), moving ? `${moving} moving` : "");
    this.#figure("in line", count(waiting), "");
    this.#figure("tokens/s", tokens < 10 ? tokens.toFixed(1) : count(Math.round(tokens)), "");
    this.#figure("TTFT p50", first.length ? ms(median(first.map((each) => each.ttft_p50))) : "–", "");
    this.#figure("KV in use", percent(used, total), "");
  }

  #figure(label, value, more) {
    let figure = this.figures.get(label);
    if (!figure) {
      figure = { value: h("span", {}), more: h("small", {}) };
      const block = h("div", { class: "figure" }, h("div", { class: "label" }, label), h("div", { class: "value" }, figure.value, " ", figure.more));
      document.getElementById("figures").append(block);
      this.figures.set(label, figure);
    }
    say(figure.value, value);
    say(figure.more, more);
  }

  renderRequests() {
    const wanted = this.filter.value.trim().toLowerCase();
    const all = [...this.store.requests.values()];
    const matching = wanted ? all.filter((each) => matches(each, wanted)) : all;
    const shown = newest(matching).slice(0, REQUESTS_MAX);
    const running = all.filter((each) => !OVER.has(each.state)).length;
    const hidden = this.store.head.hidden_requests ?? 0;
    const parts = [`${count(running + hidden)} running`, `${count(all.length - running)} over`];
    if (shown.length < matching.length || hidden) parts.push(`${shown.length} shown`);
    say(document.getElementById("requests-count"), parts.join(" · "));
    const kept = new Set(shown.map((each) => each.handle));
    for (const [handle, row] of this.rows) {
      if (kept.has(handle)) continue;
      row.element.remove();
      this.rows.delete(handle);
    }
    shown.forEach((request, at) => {
      const row = this.rows.get(request.handle) ?? this.#row(request);
      this.#fill(row, request);
      const here = this.body.children[at] ?? null;
      if (here !== row.element) this.body.insertBefore(row.element, here);
    });
    const empty = document.getElementById("requests-empty");
    empty.hidden = shown.length > 0;
    say(empty, wanted ? `No request has “${wanted}” in its id, its workers or its state.` : "No request has come in the last five minutes.");
  }

  #row(request) {
    const cells = Object.fromEntries(["state", "way", "prompt", "tokens", "ttft", "moves", "age"].map((name) => [name, h("span", {})]));
    const badge = h("span", { class: "badge" }, h("i", {}), cells.state);
    const link = h("a", { class: "mono", href: `#/request/${encodeURIComponent(request.id)}`, title: request.id }, tail(request.id, 16));
    const number = (name) => h("td", { class: "num" }, cells[name]);
    const element = h("tr", {}, h("td", {}, link), h("td", {}, badge), h("td", {}, cells.way), number("prompt"), number("tokens"),
      number("ttft"), number("moves"), number("age"));
    const row = { element, cells, badge };
    this.rows.set(request.handle, row);
    return row;
  }

  #fill({ cells, badge }, request) {
    const pip = pipOf(request);
    if (badge.dataset.pip !== pip) badge.dataset.pip = pip;
    say(cells.state, words(pip) + (request.priority ? ` · priority ${request.priority}` : ""));
    const way = request.prefill === request.decode || !request.decode ? request.prefill : `${request.prefill} → ${request.decode}`;
    say(cells.way, request.moving_to ? `${request.decode} ⇢ ${request.moving_to}` : way || "–");
    say(cells.prompt, count(request.prompt_tokens));
    say(cells.tokens, count(request.tokens));
    say(cells.ttft, ms(request.ttft_ms));
    say(cells.moves, request.moves ? String(request.moves) : "");
    say(cells.age, request.took_ms !== null ? age(request.took_ms) : request.began_ms ? age(this.store.atMs - request.began_ms) : "");
  }

  renderMoves() {
    const moves = [...this.store.moves.values()].sort((one, other) => other.at_ms - one.at_ms).slice(0, MOVES_MAX);
    const shown = moves.map((each) => `${each.key}${each.outcome}${each.rounds}${each.pause_ms}`).join();
    if (shown === this.shownMoves && this.drawnMoves) return;
    this.shownMoves = shown;
    this.drawnMoves = true;
    say(document.getElementById("moves-count"), moves.length ? `the last ${moves.length}` : "");
    document.getElementById("moves").replaceChildren(...(moves.length ? moves.map(moveItem)
      : [h("p", { class: "empty" }, "Nothing has moved in the last ten minutes.")]));
  }

  renderTasks() {
    const tasks = [...this.store.tasks.values()].reverse();
    const shown = tasks.map((each) => `${each.id}${each.state}${each.detail}`).join();
    if (shown === this.shownTasks) return;
    this.shownTasks = shown;
    document.getElementById("tasks-card").hidden = tasks.length === 0;
    document.getElementById("tasks").replaceChildren(...tasks.map((task) =>
      h("li", { "data-why": task.state === "failed" ? "pressure" : "drain" },
        h("span", {}, h("b", {}, `${task.kind} ${task.what}`), task.by ? ` by ${task.by}` : ""), h("span", { class: "quiet" }, clock(task.at_ms)),
        h("span", { class: task.state === "failed" ? "what failed" : "what" }, [task.state, task.detail].filter(Boolean).join(": ")))));
  }
}

export function moveItem(move) {
  const went = { moving: "under way", moved: `pause ${ms(move.pause_ms)}`, failed: "not moved", ended: "the request ended" }[move.outcome];
  const sizes = move.bytes ? `${plural(move.blocks, "block")} in ${plural(move.rounds, "round")}, ${bytes(move.bytes)}` : "";
  return h("li", { "data-why": move.reason },
    h("span", {}, h("span", { class: "reason" }, move.reason), ` ${move.from} → ${move.to}`), h("span", { class: "quiet" }, clock(move.at_ms)),
    h("a", { class: "mono", href: `#/request/${encodeURIComponent(move.request)}`, title: move.request }, tail(move.request, 20)),
    h("span", { class: move.outcome === "failed" ? "failed" : "" }, went),
    h("span", { class: "what" }, [move.error || move.why, sizes].filter(Boolean).join(" · ")));
}

function matches(request, wanted) {
  const fields = [request.id, request.state, request.prefill, request.decode, request.moving_to, words(pipOf(request))];
  return fields.some((each) => each.toLowerCase().includes(wanted));
}

/** Those that move first, then those that run, then those that are over; the newest of each first. */
function newest(requests) {
  const rank = (request) => (request.moving_to ? 0 : OVER.has(request.state) ? 2 : 1);
  return requests.sort((one, other) => rank(one) - rank(other) || other.handle - one.handle);
}

function median(values) {
  const sorted = values.sort((one, other) => one - other);
  return sorted[Math.floor((sorted.length - 1) / 2)];
}
