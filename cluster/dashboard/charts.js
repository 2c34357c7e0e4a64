// Charts of the last minutes, second by second, on canvas: TTFT, TPOT, tokens a second, moves.

import { count, h, ms, say } from "./elements.js";

const REASONS = ["operator", "drain", "pressure", "priority", "balance", "defragment"];
const BRIDGED = 5; // seconds without a sample that a line is drawn across
const PAD = { left: 2, right: 2, top: 8, bottom: 14 };

const CHARTS = [
  { id: "tokens", title: "Throughput", unit: "tokens/s", lines: [["tokens", "--owned", 1.5, true]], value: (s) => `${count(s.tokens)} tokens/s` },
  { id: "ttft", title: "TTFT", unit: "p50, p95", lines: [["ttft_p95", "--exported", 1, false], ["ttft_p50", "--prefill", 1.6, false]], duration: true,
    value: (s) => (s.ttft_num ? `p50 ${ms(s.ttft_p50)} · p95 ${ms(s.ttft_p95)} of ${count(s.ttft_num)}` : "none") },
  { id: "tpot", title: "TPOT", unit: "p50, p95", lines: [["tpot_p95", "--exported", 1, false], ["tpot_p50", "--decode", 1.6, false]], duration: true,
    value: (s) => (s.tpot_num ? `p50 ${ms(s.tpot_p50)} · p95 ${ms(s.tpot_p95)} of ${count(s.tpot_num)}` : "none") },
  { id: "moves", title: "Moves", unit: "a second", bars: true, value: (s) => moved(s) },
];

export class Charts {
  constructor(element, store) {
    this.store = store;
    this.cursor = null; // seconds ago; null: the latest
    this.charts = CHARTS.map((chart) => this.#build(chart));
    element.append(...this.charts.map((each) => each.element));
    this.sizes = new ResizeObserver(() => this.render());
    for (const each of this.charts) this.sizes.observe(each.canvas);
    for (const query of ["(prefers-color-scheme: dark)", "(prefers-contrast: more)"])
      matchMedia(query).addEventListener("change", () => this.#recolour());
    this.#recolour();
  }

  #build(chart) {
    const output = h("output", { "aria-live": "off" });
    const canvas = h("canvas", { id: `chart-${chart.id}`, tabindex: 0, role: "img", "aria-label": chart.title,
      keydown: (event) => this.#key(event), blur: () => this.#point(null), pointerleave: () => this.#point(null),
      pointermove: (event) => this.#pointer(event) });
    const element = h("figure", { class: "chart" },
      h("header", {}, h("h2", {}, chart.title), h("span", { class: "quiet" }, chart.unit), output), canvas);
    return { ...chart, canvas, output, element };
  }

  #recolour() {
    const style = getComputedStyle(document.documentElement);
    const names = ["--owned", "--exported", "--prefill", "--decode", "--granted", "--warn", "--bad", "--line", "--ink", "--ink2"];
    this.colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(name).trim()]));
    const c = this.colours;
    this.reasons = { operator: c["--granted"], drain: c["--warn"], pressure: c["--bad"], priority: "#c2459b", balance: c["--owned"], defragment: "#4d8f2f" };
    this.render();
  }

  #key(event) {
    const steps = { ArrowLeft: 1, ArrowRight: -1, PageUp: 30, PageDown: -30 };
    if (event.key === "Escape" || event.key === "End") return this.#point(null);
    if (event.key === "Home") return this.#point(this.store.seconds.length - 1);
    if (!(event.key in steps)) return undefined;
    event.preventDefault();
    return this.#point(Math.max(0, (this.cursor ?? 0) + steps[event.key]), true);
  }

  #pointer(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const share = (event.clientX - box.left - PAD.left) / (box.width - PAD.left - PAD.right);
    this.#point(Math.round((1 - share) * (this.store.secondsMax - 1)));
  }

  #point(cursor, spoken = false) {
    const last = this.store.seconds.length - 1;
    this.cursor = cursor === null || last < 0 ? null : Math.min(Math.max(0, cursor), last);
    for (const each of this.charts) each.output.setAttribute("aria-live", spoken ? "polite" : "off");
    this.render();
  }

  render() {
    const seconds = this.store.seconds;
    const chosen = seconds[seconds.length - 1 - (this.cursor ?? 0)];
    for (const chart of this.charts) {
      say(chart.output, chosen ? `${this.cursor === null ? "" : `${this.cursor} s ago: `}${chart.value(chosen)}` : "no second yet");
      const described = `${chart.title}, the last ${seconds.length} seconds. ${chosen ? `${this.cursor ?? 0} seconds ago: ${chart.value(chosen)}` : ""}`;
      if (document.activeElement === chart.canvas || !chart.described) chart.canvas.setAttribute("aria-label", described);
      chart.described = true;
      this.#draw(chart, seconds);
    }
  }

  #draw(chart, seconds) {
    const [width, height, scale] = [chart.canvas.clientWidth, chart.canvas.clientHeight, devicePixelRatio || 1];
    if (!width) return;
    if (chart.canvas.width !== Math.round(width * scale)) {
      chart.canvas.width = Math.round(width * scale);
      chart.canvas.height = Math.round(height * scale);
    }
    const context = chart.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const most = nice(Math.max(1, ...seconds.map((each) => peak(chart, each))));
    const step = (width - PAD.left - PAD.right) / (this.store.secondsMax - 1);
    const x = (at) => width - PAD.right - (seconds.length - 1 - at) * step;
    const y = (value) => height - PAD.bottom - (value / most) * (height - PAD.top - PAD.bottom);
    this.#axes(context, chart, { width, height, most, y });
    if (chart.bars) this.#bars(context, seconds, { x, y, step });
    else for (const line of chart.lines) this.#line(context, seconds, line, { x, y, height });
    if (this.cursor !== null) {
      const at = x(seconds.length - 1 - this.cursor);
      this.#stroke(context, "--ink2", 1, [[at, PAD.top], [at, height - PAD.bottom]]);
    }
  }

  #axes(context, chart, { width, height, most, y }) {
    context.font = "10.5px system-ui, sans-serif";
    context.fillStyle = this.colours["--ink2"];
    for (const share of [0, 0.5, 1]) {
      const at = Math.round(y(most * share)) + 0.5;
      this.#stroke(context, "--line", 1, [[PAD.left, at], [width - PAD.right, at]]);
    }
    context.textAlign = "left";
    context.fillText(chart.duration ? ms(most) : count(most), PAD.left, PAD.top + 9);
    context.fillText(`−${Math.round(this.store.secondsMax / 60)} min`, PAD.left, height - 2);
    context.textAlign = "right";
    context.fillText("now", width - PAD.right, height - 2);
  }

  #stroke(context, colour, width, points) {
    context.strokeStyle = this.colours[colour] ?? colour;
    context.lineWidth = width;
    context.lineJoin = "round";
    context.beginPath();
    points.forEach(([x, y], at) => (at ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.stroke();
  }

  #line(context, seconds, [name, colour, width, filled], { x, y, height }) {
    let run = [];
    let last = null;
    const flush = () => {
      if (run.length === 1) {
        context.fillStyle = this.colours[colour];
        context.fillRect(run[0][0] - 1, run[0][1] - 1, 2.5, 2.5);
      } else if (run.length) {
        this.#stroke(context, colour, width, run);
        if (filled) this.#fill(context, colour, run, height - PAD.bottom);
      }
      run = [];
    };
    seconds.forEach((second, at) => {
      const value = second[name];
      if (value === null || value === undefined) return;
      if (last !== null && at - last > BRIDGED) flush();
      run.push([x(at), y(value)]);
      last = at;
    });
    flush();
  }

  #fill(context, colour, points, floor) {
    context.globalAlpha = 0.14;
    context.fillStyle = this.colours[colour];
    context.beginPath();
    context.moveTo(points[0][0], floor);
    for (const [x, y] of points) context.lineTo(x, y);
    context.lineTo(points[points.length - 1][0], floor);
    context.fill();
    context.globalAlpha = 1;
  }

  #bars(context, seconds, { x, y, step }) {
    const wide = Math.max(1.5, step - 0.4);
    seconds.forEach((second, at) => {
      let below = 0;
      for (const reason of REASONS) {
        const num = second.moves[reason];
        if (!num) continue;
        context.fillStyle = this.reasons[reason];
        context.fillRect(x(at) - wide, y(below + num), wide, y(below) - y(below + num));
        below += num;
      }
    });
  }
}

function peak(chart, second) {
  if (chart.bars) return Object.values(second.moves).reduce((sum, each) => sum + each, 0);
  return Math.max(...chart.lines.map(([name]) => second[name] ?? 0));
}

/** The next round figure at or above. */
export function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= value * 0.999);
}

function moved(second) {
  const parts = Object.entries(second.moves).map(([reason, num]) => `${num} ${reason}`);
  if (second.failed) parts.push(`${second.failed} failed`);
  return parts.join(" · ") || "none";
}
