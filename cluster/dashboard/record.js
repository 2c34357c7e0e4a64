// A request's flight record: what its first token waited for, where it was placed and why, how it moved, its story.

import { OVER } from "./store.js";
import { age, bytes, count, h, ms, plural, words } from "./elements.js";
import { ask } from "./feed.js";
import { migrateControls } from "./actions.js";
import { pipOf } from "./pools.js";
import { timeline } from "./timeline.js";

const REFRESH_MS = 2000;
const STAGES = {
  edge: "read, checked and tokenized", line: "in line for workers", retry: "attempts that gave no token", wire: "between router and worker",
  queue: "at the worker, until its first step", prefill: "reading the prompt", deliver: "to the client's connection", other: "not measured",
};

export class RecordPanel {
  constructor(store, drawer) {
    this.store = store;
    this.drawer = drawer;
    this.id = null;
    this.timer = null;
  }

  open(id) {
    this.controls = migrateControls(this.store, id, () => this.load());
    this.body = h("div", {}, h("p", { class: "empty" }, "Asking the router that has it."));
    this.drawer.show(id, this.controls.element, this.body, () => this.close()); // which closes what was there before
    this.id = id;
    this.shown = "";
    this.load();
  }

  close() {
    this.id = null;
    clearTimeout(this.timer);
  }

  async load() {
    const id = this.id;
    clearTimeout(this.timer);
    if (id === null) return;
    try {
      const record = await ask(`requests/${encodeURIComponent(id)}`);
      if (this.id === id) this.#draw(record);
      if (this.id === id && !OVER.has(record.state)) this.timer = setTimeout(() => this.load(), REFRESH_MS);
    } catch (error) {
      if (this.id !== id) return;
      if (!this.shown) this.body.replaceChildren(h("p", { class: "empty" }, error.message, " Records of requests are kept for five minutes after their end."));
      this.timer = setTimeout(() => this.load(), 2 * REFRESH_MS);
    }
  }

  #draw(record) {
    this.controls.update();
    const shown = JSON.stringify(record);
    if (shown === this.shown) return;
    this.shown = shown;
    const known = this.store.byId.get(record.request);
    const nowMs = known?.began_ms ? this.store.atMs - known.began_ms : null;
    const open = new Set([...this.body.querySelectorAll("details[open]")].map((each) => each.dataset.name));
    this.body.replaceChildren(...[facts(record, known), stages(record), journey(record, nowMs), moves(record), placements(record, open), story(record)].filter(Boolean));
  }
}

function facts(record, known) {
  const state = known ? pipOf(known) : record.state;
  const all = [
    ["state", h("span", { class: "badge", "data-pip": state }, h("i", {}), words(state))], ["router", record.router],
    ["prompt", plural(record.prompt_tokens, "token")], ["answer", plural(record.tokens, "token")],
    ["TTFT", ms(record.ttft_ms)], ["moves", String(record.moves.filter((each) => each.outcome === "moved").length)],
  ];
  return h("section", {}, h("dl", { class: "facts-list" }, all.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    record.error && h("p", { class: "error" }, record.error));
}

function stages(record) {
  if (record.ttft_ms === null) return null;
  const bar = record.stages.filter((each) => each.ms > 0).map((each) =>
    h("span", { "data-stage": each.name, title: `${each.name}: ${ms(each.ms)}`, style: { "flex-grow": String(each.ms) } }));
  const list = record.stages.map((each) => h("li", { "data-stage": each.name, title: STAGES[each.name] ?? "" }, h("i", {}), each.name,
    h("b", {}, `${ms(each.ms)} · ${Math.round((100 * each.ms) / (record.ttft_ms || 1))} %`)));
  return h("section", {}, h("h3", {}, `First token after ${ms(record.ttft_ms)}`), h("div", { class: "stages", "aria-hidden": true }, bar), h("ul", { class: "stage-list" }, list));
}

function journey(record, nowMs) {
  if (!record.placements.length) return null;
  return h("section", {}, h("h3", {}, "Where it was"), timeline(record, nowMs));
}

function moves(record) {
  if (!record.moves.length) return null;
  return h("section", {}, h("h3", {}, plural(record.moves.length, "move")), record.moves.map((move) => {
    const rest = Math.max(0, move.pause_ms - move.fence_ms);
    const phases = [["precopy", move.precopy_ms], ["fence", move.fence_ms], ["rest", rest]].filter(([, took]) => took > 0);
    const words = [
      `pre-copy ${ms(move.precopy_ms)} in ${plural(move.rounds, "round")}, fence ${ms(move.fence_ms)}`,
      `${plural(move.blocks, "block")} copied, ${count(move.blocks_reused)} found there, ${bytes(move.bytes)}`,
    ];
    return h("div", { class: "move-card", "data-why": move.reason },
      h("p", {}, h("span", { class: "reason" }, move.reason), ` ${move.from} → ${move.to}: `,
        move.outcome === "moved" ? h("b", {}, `pause ${ms(move.pause_ms)}`) : h("b", { class: move.outcome === "failed" ? "error" : "" }, move.outcome)),
      phases.length > 0 && h("div", { class: "phases", "aria-hidden": true }, phases.map(([name, took]) => h("i", { class: name, style: { "flex-grow": String(took) } }))),
      h("p", { class: "quiet" }, words.join(" · ")), (move.error || move.why) && h("p", { class: "quiet" }, move.error || move.why));
  }));
}

function placements(record, open) {
  if (!record.placements.length) return null;
  return h("section", {}, h("h3", {}, record.placements.length === 1 ? "Placement" : "Placements"), record.placements.map((placed, at) => {
    const most = Math.max(...placed.candidates.map((each) => each.score_ms), 1);
    const rows = placed.candidates.map((each) => h("tr", { class: each.chosen ? "chosen" : "" },
      h("td", {}, each.chosen ? `✓ ${each.worker}` : each.worker), h("td", {}, each.part),
      h("td", {}, h("span", { class: "score" }, h("i", { style: { width: `${Math.max(2, (70 * each.score_ms) / most)}px` } }), ms(each.score_ms))),
      h("td", { class: "quiet" }, Object.entries(each.terms).map(([name, value]) => `${words(name)} ${Math.round(10 * value) / 10}`).join(", "))));
    const way = placed.prefill_worker === placed.decode_worker ? placed.prefill_worker : `${placed.prefill_worker} → ${placed.decode_worker}`;
    const last = at === record.placements.length - 1;
    return h("details", { "data-name": String(at), open: last || open.has(String(at)) },
      h("summary", {}, h("b", {}, way), ` after ${ms(placed.at_ms)}`), h("p", { class: "quiet" }, placed.reason),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `workers considered for ${way}` }, h("table", {},
        h("thead", {}, h("tr", {}, ["worker", "for", "score, the lowest wins", "made of"].map((each) => h("th", { scope: "col" }, each)))), h("tbody", {}, rows))));
  }));
}

function story(record) {
  return h("section", {}, h("h3", {}, "Story"), h("ol", { class: "story" }, record.story.map((each) => h("li", {}, h("span", {}, each.at_ms < 60_000 ? ms(each.at_ms) : age(each.at_ms)), h("div", {}, each.what)))));
}
