// Moves between workers as arcs over the pools: a dot travels while a request is copied, and arrives when it is owned.

import { svg } from "./elements.js";

const ARCS_MAX = 16;
const HANDOFFS_MAX = 6;
const FRAME_MS = 33;
const PASS_MS = 1100;
const SHOWN_MS = 2600; // a move is often over before it can be seen
const HANDOFF_MS = 700;
const LABELS_AT = [0.5, 0.3, 0.7];
const STUCK_MS = 60_000; // whatever becomes of a move, its arc ends

export class Arcs {
  constructor(stage, pools) {
    this.stage = stage;
    this.pools = pools;
    this.layer = svg("svg", { class: "arcs", "aria-hidden": "true" });
    stage.append(this.layer);
    this.arcs = new Map();
    this.drawnMs = 0;
    this.labels = 0;
    this.frame = null;
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
  }

  /** A move began, or is known to be over. */
  move(move, reason = move.reason) {
    const known = this.arcs.get(move.key);
    if (known) {
      known.outcome = move.outcome;
      known.label?.replaceChildren(words(move));
      known.path.classList.toggle("failed", move.outcome === "failed");
      return;
    }
    if (this.arcs.size >= ARCS_MAX || document.hidden) return;
    this.#add(move.key, move.from, move.to, { reason, outcome: move.outcome, text: words(move), shownMs: SHOWN_MS });
  }

  /** A decode worker owns what a prefill worker read: as quick as it is common. */
  handoff(request) {
    const handoffs = [...this.arcs.values()].filter((each) => each.reason === "handoff").length;
    if (handoffs >= HANDOFFS_MAX || this.arcs.size >= ARCS_MAX || this.still.matches || document.hidden) return;
    const arc = { reason: "handoff", outcome: "moved", text: "", shownMs: HANDOFF_MS };
    this.#add(`handoff/${request.handle}`, request.prefill, request.decode, arc);
  }

  clear() {
    for (const arc of this.arcs.values()) arc.group.remove();
    this.arcs.clear();
  }

  #add(key, from, to, arc) {
    const [source, target] = [this.pools.tile(from), this.pools.tile(to)];
    if (!source || !target) return;
    const stage = this.stage.getBoundingClientRect();
    const [a, b] = [middle(source, stage), middle(target, stage)];
    const length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
    const bend = Math.min(90, 24 + length / 5);
    const across = Math.abs(b.x - a.x) > Math.abs(b.y - a.y);
    const c = { x: (a.x + b.x) / 2 + (across ? 0 : bend), y: (a.y + b.y) / 2 - (across ? bend : 0) };
    const path = svg("path", { class: `arc ${arc.reason === "handoff" ? "handoff" : ""} ${arc.outcome}`, d: `M${a.x} ${a.y}Q${c.x} ${c.y} ${b.x} ${b.y}` });
    const dot = svg("circle", { class: "arc-dot", r: arc.reason === "handoff" ? 3 : 5.5 });
    const at = on(a, c, b, LABELS_AT[this.labels++ % LABELS_AT.length]); // two arcs of one way keep their words apart
    const label = arc.text && svg("text", { class: "arc-label", x: at.x, y: at.y - 8 }, arc.text);
    const group = svg("g", { "data-why": arc.reason, "data-move": key }, path, dot, label);
    this.layer.append(group);
    Object.assign(arc, { a, b, c, path, dot, label, group, beganMs: performance.now(), landedMs: null });
    this.arcs.set(key, arc);
    this.#run();
  }

  #run() {
    if (this.frame === null && this.arcs.size) this.frame = requestAnimationFrame((nowMs) => this.#draw(nowMs));
  }

  #draw(nowMs) {
    this.frame = null;
    if (nowMs - this.drawnMs >= FRAME_MS) {
      this.drawnMs = nowMs;
      for (const [key, arc] of this.arcs) {
        if (!this.#drawArc(arc, nowMs)) {
          arc.group.remove();
          this.arcs.delete(key);
        }
      }
    }
    this.#run();
  }

  /** False when it has been seen. */
  #drawArc(arc, nowMs) {
    const sinceMs = Math.max(0, nowMs - arc.beganMs);
    const pass = arc.reason === "handoff" ? HANDOFF_MS : PASS_MS;
    const over = arc.outcome !== "moving";
    if (over && arc.landedMs === null && sinceMs >= pass) arc.landedMs = nowMs;
    if (sinceMs > STUCK_MS) return false;
    if (arc.landedMs !== null) {
      const left = Math.max(arc.shownMs - pass, 300) - (nowMs - arc.landedMs);
      if (left <= 0) return false;
      arc.group.style.opacity = String(Math.min(1, left / 500));
    }
    const t = this.still.matches ? 1 : arc.landedMs !== null ? (arc.outcome === "failed" ? 0 : 1) : (sinceMs % pass) / pass;
    const place = on(arc.a, arc.c, arc.b, t * t * (3 - 2 * t));
    arc.dot.setAttribute("cx", place.x.toFixed(1));
    arc.dot.setAttribute("cy", place.y.toFixed(1));
    return true;
  }
}

function words(move) {
  if (move.outcome === "failed") return `${move.reason}: not moved`;
  return move.outcome === "moved" && move.pause_ms ? `${move.reason}, pause ${move.pause_ms} ms` : move.reason;
}

function middle(tile, stage) {
  const box = tile.getBoundingClientRect();
  return { x: Math.round(box.left - stage.left + box.width / 2), y: Math.round(box.top - stage.top + Math.min(box.height / 2, 30)) };
}

function on(a, c, b, t) {
  const u = 1 - t;
  return { x: u * u * a.x + 2 * u * t * c.x + t * t * b.x, y: u * u * a.y + 2 * u * t * c.y + t * t * b.y };
}
