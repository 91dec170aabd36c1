// Line charts over the last minutes, drawn by us: SVG at the size it has on the page, one cursor for all of them.

import { h, say, set, svg } from "./dom.js";
import { NONE } from "./format.js";

const SPANS_S = [60, 120, 300, 600]; // the shortest that shows all samples
const BREAK_S = 3.5; // a longer silence between two samples is a hole in the line
const HEIGHT = 150;
const PAD = { left: 52, right: 10, top: 8, bottom: 20 };

/** Of all charts: seconds before now that the reader points at (null = nowhere), and how far back they go. */
const cursor = { ago: null, span_s: SPANS_S[0], charts: new Set() };

function point(ago) {
  cursor.ago = ago;
  for (const chart of cursor.charts) chart.draw();
}

/** About four round steps from 0 up to at least `top`. */
function ticks(top) {
  const rough = top / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const marks = [];
  for (let at = 0; marks.length < 2 || marks.at(-1) < top; at += 1) marks.push(at * step);
  return marks;
}

export class Chart {
  /** lines: [{name, tone, read(sample)}]; format(value) -> text; least: the axis reaches at least that far. */
  constructor(title, lines, format, { least = 1, note = "" } = {}) {
    Object.assign(this, { title, lines, format, least });
    this.samples = [];
    this.width = 400;
    this.values = lines.map(() => h("b"));
    this.when = h("span", { class: "muted" });
    this.frame = svg("g");
    this.paths = lines.map((line) => svg("path", { class: `line ${line.tone}` }));
    this.rule = svg("line", { class: "rule", y1: PAD.top, y2: HEIGHT - PAD.bottom });
    this.picture = svg("svg", { height: HEIGHT, role: "img", tabindex: 0 }, this.frame, this.paths, this.rule);
    const legend = lines.map((line, at) => h("span", { class: `key ${line.tone}` }, line.name, " ", this.values[at]));
    this.node = h(
      "figure", { class: "panel chart" }, h("h3", {}, title),
      h("p", { class: "legend" }, legend, this.when), this.picture, note ? h("figcaption", { class: "note" }, note) : null,
    );
    this.picture.addEventListener("pointermove", (event) => point(this.#ago(event)));
    this.picture.addEventListener("pointerleave", () => point(null));
    this.picture.addEventListener("blur", () => point(null));
    this.picture.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(([entry]) => this.#resize(entry.contentRect.width)).observe(this.picture);
    cursor.charts.add(this);
  }

  update(samples) {
    this.samples = samples;
    this.draw();
  }

  #resize(width) {
    if (Math.abs(width - this.width) < 1 || width < 50) return;
    this.width = width;
    this.draw();
  }

  #ago(event) {
    const x = event.clientX - this.picture.getBoundingClientRect().left;
    return Math.min(Math.max(1 - (x - PAD.left) / this.#inner(), 0), 1) * cursor.span_s;
  }

  #key(event) {
    const step = { ArrowLeft: 1, ArrowRight: -1, Home: cursor.span_s, End: -cursor.span_s }[event.key];
    if (step === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    point(Math.min(Math.max((cursor.ago ?? 0) + step, 0), cursor.span_s));
  }

  #inner = () => this.width - PAD.left - PAD.right;

  draw() {
    if (!this.node.isConnected || this.node.closest("[hidden]")) return;
    const now = this.samples.at(-1)?.at ?? 0;
    const age_s = now - (this.samples[0]?.at ?? now);
    cursor.span_s = SPANS_S.find((span) => span >= age_s) ?? SPANS_S.at(-1);
    const shown = this.samples.filter((sample) => now - sample.at <= cursor.span_s);
    const rows = this.lines.map((line) => shown.map(line.read));
    const top = rows.flat().reduce((most, value) => Math.max(most, value ?? 0), this.least);
    const marks = ticks(top);
    const x = (at) => PAD.left + (1 - (now - at) / cursor.span_s) * this.#inner();
    const y = (value) => HEIGHT - PAD.bottom - (value / marks.at(-1)) * (HEIGHT - PAD.bottom - PAD.top);
    this.#drawFrame(marks, y);
    this.paths.forEach((path, at) => set(path, "d", outline(shown, rows[at], x, y)));
    this.#read(shown, rows, now, x);
    set(this.picture, "viewBox", `0 0 ${this.width} ${HEIGHT}`);
  }

  #drawFrame(marks, y) {
    const span = cursor.span_s;
    const key = `${this.width} ${span} ${marks}`;
    if (key === this.frameKey) return;
    this.frameKey = key;
    const agos = [1, 2, 3, 4].map((part) => (part * span) / 5);
    const right = this.width - PAD.right;
    this.frame.replaceChildren(
      ...marks.map((mark) => svg("line", { class: "grid", x1: PAD.left, x2: right, y1: y(mark), y2: y(mark) })),
      ...marks.map((mark) => svg("text", { x: PAD.left - 6, y: y(mark) + 4, "text-anchor": "end" }, this.format(mark))),
      ...agos.map((ago) => svg("text", { x: right - (ago / span) * this.#inner(), y: HEIGHT - 4, "text-anchor": "middle" }, ago % 60 ? `−${ago} s` : `−${ago / 60} min`)),
      svg("text", { x: right, y: HEIGHT - 4, "text-anchor": "end" }, "now"),
    );
  }

  /** Figures beside the names: of the moment pointed at, else the newest. */
  #read(shown, rows, now, x) {
    let at = shown.length - 1;
    const ago = cursor.ago;
    if (ago !== null) {
      const wanted = now - ago;
      at = shown.reduce((best, sample, index) => (Math.abs(sample.at - wanted) < Math.abs(shown[best].at - wanted) ? index : best), at);
      if (at >= 0 && Math.abs(shown[at].at - wanted) > BREAK_S) at = -1;
    }
    const texts = rows.map((row) => (typeof row[at] === "number" ? this.format(row[at]) : NONE));
    this.values.forEach((node, index) => say(node, texts[index]));
    say(this.when, ago === null ? "" : `${Math.round(ago)} s ago`);
    set(this.picture, "aria-label", `${this.title}: ${this.lines.map((line, index) => `${line.name} ${texts[index]}`).join(", ")}`);
    set(this.rule, "visibility", ago === null ? "hidden" : "visible");
    set(this.rule, "x1", x(now - (ago ?? 0)).toFixed(1));
    set(this.rule, "x2", x(now - (ago ?? 0)).toFixed(1));
  }
}

function outline(samples, values, x, y) {
  let path = "";
  let isDown = false;
  samples.forEach((sample, at) => {
    const value = values[at];
    if (typeof value !== "number") {
      isDown = false;
      return;
    }
    if (at && sample.at - samples[at - 1].at > BREAK_S) isDown = false;
    const place = `${x(sample.at).toFixed(1)} ${y(value).toFixed(1)}`;
    // a lone point between holes would not be seen: it gets a stroke of its own
    path += isDown ? `L${place}` : `M${place}h.01`;
    isDown = true;
  });
  return path;
}

/** A small line without axes, from 0 to its greatest value. */
export function spark(values, count, width = 150, height = 30) {
  const most = Math.max(...values, 1);
  const points = values.map((value, at) => `${(((count - values.length + at) / (count - 1)) * width).toFixed(1)},${(height - 2 - (value / most) * (height - 4)).toFixed(1)}`);
  return points.join(" ");
}
