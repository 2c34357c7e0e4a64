// One worker: its blocks by state, its requests, and what an operator may do with it.

import { BLOCK_STATES } from "./store.js";
import { count, h, ms, plural, tail, words } from "./elements.js";
import { WORKER_ACTIONS } from "./actions.js";
import { barOf, pipOf } from "./pools.js";

const ROWS_MAX = 60;

export class WorkerPanel {
  constructor(store, drawer) {
    this.store = store;
    this.drawer = drawer;
    this.id = null;
  }

  open(id) {
    this.body = h("div", {});
    this.shown = "";
    const actions = WORKER_ACTIONS.map((action) => h("button", { type: "button", class: action.danger ? "danger" : "", click: () => action.run(this.store, id) }, action.label));
    this.drawer.show(id, h("div", { class: "act" }, actions), this.body, () => { this.id = null; });
    this.id = id;
    this.render();
  }

  render() {
    if (this.id === null) return;
    const worker = this.store.workers.get(this.id);
    if (!worker) {
      this.body.replaceChildren(h("p", { class: "empty" }, `The router knows no worker ${this.id} any more.`));
      return;
    }
    const running = this.store.running(worker);
    const shown = JSON.stringify([{ ...worker, requests: null }, running.map((each) => [each.handle, pipOf(each), each.tokens])]);
    if (shown === this.shown) return;
    this.shown = shown;
    const focused = document.activeElement?.dataset?.request;
    this.body.replaceChildren(facts(worker), blocks(worker), requests(worker, running));
    if (focused) this.body.querySelector(`[data-request="${focused}"]`)?.focus();
  }
}

function facts(worker) {
  const all = [
    ["role", worker.role], ["state", worker.state], ["incarnation", String(worker.incarnation)], ["exact", worker.exact ? "yes" : "no"],
    ["batch", plural(worker.running, "request")], ["waiting", plural(worker.waiting, "request")],
    ["prefill backlog", plural(worker.backlog, "token")], ["last step", ms(worker.step_ms)],
    ["swap", worker.swap_total ? `${count(worker.swap_used)} of ${count(worker.swap_total)} blocks` : "none"],
    ["audit", worker.audit ? plural(worker.audit, "finding") : "well"],
  ];
  return h("section", {}, h("dl", { class: "facts-list" }, all.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    worker.reason && worker.state !== "ready" && h("p", { class: worker.state === "dead" ? "error" : "quiet" }, worker.reason));
}

function blocks(worker) {
  return h("section", {}, h("h3", {}, `${plural(worker.total, "KV block")}`), h("div", { class: "kv", "aria-hidden": true, style: { "background-image": barOf(worker) } }),
    h("ul", { class: "blocks" }, BLOCK_STATES.map((state) => h("li", { "data-block": state }, h("i", {}), state, h("b", {}, count(worker[state]))))));
}

function requests(worker, running) {
  const strangers = Math.max(0, worker.running + worker.waiting - running.length);
  const rows = running.slice(-ROWS_MAX).reverse().map((each) => h("tr", {},
    h("td", {}, h("a", { class: "mono", href: `#/request/${encodeURIComponent(each.id)}`, "data-request": String(each.handle), title: each.id }, tail(each.id, 20))),
    h("td", {}, h("span", { class: "badge", "data-pip": pipOf(each) }, h("i", {}), words(pipOf(each)), each.moving_to && ` to ${each.moving_to}`)),
    h("td", { class: "num" }, count(each.prompt_tokens)), h("td", { class: "num" }, count(each.tokens))));
  const head = ["request", "state", "prompt", "tokens"].map((each, at) => h("th", { scope: "col", class: at > 1 ? "num" : "" }, each));
  return h("section", {}, h("h3", {}, `Requests: ${count(running.length)}${strangers ? `, and ${strangers} that this router does not know` : ""}`),
    rows.length ? h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows)) : h("p", { class: "quiet" }, "Nothing runs here."));
}
