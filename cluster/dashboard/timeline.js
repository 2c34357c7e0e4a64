// A request's life as a picture: a lane for each worker that had it, and its moves as hops between lanes.

import { ms, svg } from "./elements.js";

const WIDTH = 720, LEFT = 92, RIGHT = 12, LANE = 26, BAR = 12, TOP = 8;

/** `nowMs`: milliseconds since it was submitted, for one that runs. */
export function timeline(record, nowMs) {
  const { spans, hops, marks, endMs } = read(record, nowMs);
  const lanes = [...new Set(spans.map((each) => each.worker))];
  const bottom = TOP + lanes.length * LANE;
  const x = (atMs) => LEFT + (Math.max(0, atMs) / endMs) * (WIDTH - LEFT - RIGHT);
  const y = (worker) => TOP + lanes.indexOf(worker) * LANE + LANE / 2;
  const picture = svg("svg", { class: "timeline", viewBox: `0 0 ${WIDTH} ${bottom + 24}`, role: "img", "aria-label": described(spans, hops) });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    const at = x(endMs * share);
    const anchor = share === 1 ? "end" : share === 0 ? "start" : "middle";
    picture.append(svg("line", { class: "grid", x1: at, x2: at, y1: TOP, y2: bottom }),
      svg("text", { x: at, y: bottom + 16, "text-anchor": anchor }, ms(endMs * share)));
  }
  for (const worker of lanes) picture.append(svg("text", { class: "lane", x: 0, y: y(worker) + 4 }, worker));
  for (const span of spans) {
    const wide = Math.max(1.5, x(span.endMs) - x(span.beginMs));
    picture.append(svg("rect", { class: "span", "data-part": span.part, x: x(span.beginMs), y: y(span.worker) - BAR / 2, width: wide, height: BAR, rx: 2 },
      svg("title", {}, `${span.worker}, ${span.part}: ${ms(span.beginMs)} to ${ms(span.endMs)}`)));
  }
  for (const hop of hops) {
    const [a, b] = [y(hop.from), y(hop.to)];
    if (!lanes.includes(hop.from) || !lanes.includes(hop.to)) continue;
    const [begin, end] = [x(hop.beginMs), Math.max(x(hop.endMs), x(hop.beginMs) + 2)];
    picture.append(svg("g", { "data-why": hop.reason }, svg("path", { class: `hop ${hop.outcome}`, d: `M${begin} ${a}C${end} ${a} ${begin} ${b} ${end} ${b}` }),
      svg("text", { class: "why", x: Math.min(end + 5, WIDTH - 60), y: (a + b) / 2 + 4 }, hop.reason)));
  }
  for (const mark of marks) {
    if (!lanes.includes(mark.worker)) continue;
    picture.append(svg("circle", { class: "mark", cx: x(mark.atMs), cy: y(mark.worker), r: 3 }, svg("title", {}, `${mark.what}: ${ms(mark.atMs)}`)));
  }
  return picture;
}

/** Where it was when, from the story: placements, who came to own it, moves, the end. */
export function read(record, nowMs) {
  const story = record.story;
  const last = story.length ? story[story.length - 1].at_ms : 0;
  const over = ["finished", "cancelled", "failed"].includes(record.state);
  const endMs = Math.max(1, over ? last : Math.max(last, nowMs ?? 0));
  const spans = [], hops = [], marks = [];
  const placements = [...record.placements];
  const moves = [...record.moves];
  let open = null;
  const close = (atMs) => {
    if (open && atMs >= open.beginMs) spans.push({ ...open, endMs: atMs });
    open = null;
  };
  for (const { at_ms: atMs, what } of story) {
    const owner = /^(\S+) owns it at epoch/.exec(what);
    const move = /^moves from (\S+) to (\S+) \((\w+)/.exec(what);
    if (what.startsWith("placed on")) {
      close(atMs);
      const placement = placements.find((each) => each.at_ms === atMs) ?? placements.shift();
      if (placement) open = { worker: placement.prefill_worker, part: "prefill", beginMs: atMs, decode: placement.decode_worker, local: placement.mode === "local" };
    } else if (what === "first token") {
      marks.push({ worker: open?.worker, atMs, what });
      if (open?.local) {
        close(atMs);
        const at = spans[spans.length - 1];
        open = { worker: at.worker, part: "decode", beginMs: atMs };
      }
    } else if (move) {
      const known = moves.find((each) => each.from === move[1] && each.to === move[2]);
      if (known) moves.splice(moves.indexOf(known), 1);
      const took = known ? known.precopy_ms + Math.max(known.fence_ms, known.pause_ms) : 0;
      hops.push({ from: move[1], to: move[2], reason: move[3], outcome: known?.outcome ?? "moving", beginMs: atMs, endMs: Math.min(endMs, atMs + took) });
      for (const worker of [move[1], move[2]]) if (known?.outcome === "failed") spans.push({ worker, part: "wait", beginMs: atMs, endMs: atMs });
    } else if (owner) {
      const from = open?.worker;
      close(atMs);
      open = { worker: owner[1], part: "decode", beginMs: atMs };
      const hop = hops[hops.length - 1];
      if (hop && hop.to === owner[1] && hop.outcome !== "failed") hop.endMs = atMs;
      else if (from && from !== owner[1]) hops.push({ from, to: owner[1], reason: "handoff", outcome: "moved", beginMs: atMs, endMs: atMs });
    } else if (what.startsWith("attempt lost")) {
      marks.push({ worker: open?.worker, atMs, what });
      close(atMs);
    }
  }
  close(endMs);
  return { spans, hops, marks, endMs };
}

function described(spans, hops) {
  const parts = spans.map((each) => `${each.part} at ${each.worker} from ${ms(each.beginMs)} to ${ms(each.endMs)}`);
  return [...parts, ...hops.map((each) => `${each.reason} from ${each.from} to ${each.to} after ${ms(each.beginMs)}`)].join("; ");
}
