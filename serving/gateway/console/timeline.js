// The life of one request: where its time went, lanes of what happened, and the same in words.

import { ServerError, get, getJson } from "./api.js";
import { h, say, set, style } from "./dom.js";
import { NONE, clock, figure, seconds } from "./format.js";
import { Poll } from "./poll.js";
import { gapCause, told } from "./words.js";

const PERIOD_MS = 1000;
const MAX_LANES = 32;
const MAX_ZOOM = 64;
const PARTS = [["read_s", "read", "read"], ["tokenise_s", "tokenised", "tokenise"], ["queue_s", "queued", "queue"], ["prefill_s", "chunk", "prefill"], ["decode_s", "decode", "decode"]];
const ENDED = new Set(["finished", "failed", "cancelled", "refused"]);

export class Timeline {
  constructor(node) {
    this.node = node;
    this.id = "";
    this.zoom = 1;
    this.poll = new Poll(() => getJson(this.#path()), PERIOD_MS, (account) => this.#heard(account), (error) => this.#failed(error));
    this.back = h("a", { href: "#requests", class: "back" }, "← all requests");
    this.title = h("h2", { tabindex: -1 });
    this.state = h("span", { class: "badge" });
    this.trace = h("button", { type: "button", on: { click: () => this.#download() } }, "Chrome trace");
    this.message = h("p", { class: "note", role: "status" });
    this.facts = h("dl", { class: "facts wide-facts" });
    this.parts = h("div");
    this.scale = h("div", { class: "ruler", "aria-hidden": "true" });
    this.lanes = h("div", { class: "lanes" });
    this.inner = h("div", { class: "inner" }, this.scale, this.lanes);
    this.names = h("div", { class: "names" });
    this.detail = h("p", { class: "detail", role: "status" });
    this.words = h("div", { class: "words" });
    const button = (text, title, factor) => h("button", { type: "button", title, "aria-label": title, on: { click: () => this.#zoom(factor) } }, text);
    this.graph = h("section", { class: "panel graph", "aria-label": "Timeline; arrow keys move from event to event, plus and minus zoom", on: { keydown: (event) => this.#key(event) } },
      h("div", { class: "row" }, h("h3", {}, "Timeline"), h("span", { class: "zoom" }, button("−", "Zoom out (−)", 0.5), button("+", "Zoom in (+)", 2), button("1:1", "All of it (0)", 0))),
      h("div", { class: "laned" }, this.names, h("div", { class: "scroll" }, this.inner)), this.detail);
    this.lanes.addEventListener("focusin", (event) => this.#show(event.target));
    this.lanes.addEventListener("pointerover", (event) => this.#show(event.target));
    node.replaceChildren(h("header", { class: "row head" }, this.back, this.title, this.state, this.trace), this.message, this.facts, this.parts, this.graph, this.words);
  }

  open(id) {
    if (id !== this.id) {
      this.id = id;
      this.drawn = "";
      this.zoom = 1;
      this.events = new Map(); // key -> event
      for (const part of [this.facts, this.parts, this.lanes, this.names, this.scale, this.words]) part.replaceChildren();
      say(this.title, id);
      say(this.state, "…");
      say(this.message, "");
      say(this.detail, "");
      this.graph.hidden = true;
      this.title.focus();
    }
    this.poll.start();
  }

  close() {
    this.poll.stop();
    this.id = "";
  }

  #path = () => `v1/requests/${encodeURIComponent(this.id)}`;

  #failed(error) {
    say(this.message, error.message);
    if (error instanceof ServerError && error.status === 404) this.poll.stop();
  }

  async #download() {
    try {
      const trace = await (await get(`${this.#path()}?format=chrome`)).blob();
      const link = h("a", { href: URL.createObjectURL(trace), download: `${this.id}.trace.json` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      say(this.message, "The trace opens in chrome://tracing and ui.perfetto.dev.");
    } catch (error) {
      say(this.message, error.message);
    }
  }

  #heard(account) {
    if (ENDED.has(account.state)) this.poll.stop();
    const key = JSON.stringify(account);
    if (key === this.drawn) return;
    this.drawn = key;
    this.account = account;
    say(this.title, account.id || account.request_id);
    say(this.state, account.state);
    set(this.state, "class", `badge ${account.state}`);
    say(this.message, account.error ? `${account.error.message} (${account.error.code})` : "");
    this.#facts(account);
    this.#parts(account);
    this.#graph(account);
    this.#words(account);
  }

  #facts(account) {
    const { summary } = account;
    const isOver = ENDED.has(account.state);
    const facts = [
      ["endpoint", `${account.endpoint}${account.stream ? ", streamed" : ""}`],
      ["model", account.model || NONE],
      ["arrived", clock(account.arrived_at)],
      [isOver ? "took" : "for", seconds(account.elapsed_s)],
      ["first token", seconds(account.time_to_first_token_s)],
      ["prompt", `${figure(account.prompt_tokens)} tokens${isOver ? `, ${figure(account.cached_tokens)} cached` : ""}`],
      ["output", `${figure(account.completion_tokens)} tokens${account.n > 1 ? ` in ${account.n} choices` : ""}`],
      ["long gaps", summary.num_gaps ? `${figure(summary.num_gaps)}, longest ${seconds(summary.longest_gap_s)}: ${gapCause(longestOf(account)?.cause)}` : "none"],
      ["preempted / resumed", `${figure(summary.num_preemptions)} / ${figure(summary.num_resumes)}`],
      ["request id", account.request_id],
      ["fingerprint", account.fingerprint || NONE],
    ];
    this.facts.replaceChildren(...facts.map(([what, value]) => h("div", {}, h("dt", {}, what), h("dd", {}, value))));
  }

  /** One bar of the whole, in the order of time. */
  #parts(account) {
    const whole = account.elapsed_s || 1;
    const parts = PARTS.map(([key, kind, name]) => [kind, name, account.summary[key]]).filter(([, , took]) => typeof took === "number" && took > 0);
    const rest = whole - parts.reduce((total, [, , took]) => total + took, 0);
    if (rest > 0.005 * whole) parts.push(["rest", "the rest", rest]);
    this.parts.replaceChildren(h("section", { class: "panel" }, h("h3", {}, "Where the time went"),
      h("div", { class: "stack", "aria-hidden": "true" }, parts.map(([kind, , took]) => h("i", { class: `k ${kind}`, style: { "flex-grow": String(took) } }))),
      h("p", { class: "legend" }, parts.map(([kind, name, took]) => h("span", {}, h("i", { class: `k ${kind}` }), `${name} `, h("b", {}, seconds(took)), h("span", { class: "muted" }, ` ${Math.round((100 * took) / whole)} %`))))));
  }

  #graph(account) {
    const focused = this.lanes.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const lanes = [{ name: "request", events: account.events }, ...account.choices.slice(0, MAX_LANES).map((choice) => ({ name: `choice ${choice.index}`, choice, events: choice.events }))];
    const end = Math.max(account.elapsed_s, ...lanes.flatMap(({ events }) => events.map((event) => event.at_s + (event.for_s ?? 0))), 1e-3);
    this.end = end;
    this.events = new Map();
    this.rows = lanes.map(({ events }, lane) => events.map((event, at) => this.#mark(event, `${lane}:${event.kind}:${event.at_s}:${at}`, end)));
    this.rows.forEach((marks) => this.#spread(marks, end));
    this.lanes.replaceChildren(...this.rows.map((marks, lane) => h("div", { class: "lane", role: "group", "aria-label": lanes[lane].name }, marks)));
    this.names.replaceChildren(...lanes.map(({ name, choice }) => h("div", {}, h("b", {}, name), h("span", { class: "muted" }, choice ? `${choice.replica || NONE} · ${figure(choice.num_tokens)} tok` : "preparation"))));
    this.graph.hidden = false;
    this.#ruler();
    const all = this.rows.flat();
    const again = all.find((mark) => mark.dataset.key === focused);
    set(again ?? all[0], "tabindex", 0);
    again?.focus({ preventScroll: true });
    const left = account.choices.length - MAX_LANES;
    if (!this.detail.textContent) say(this.detail, left > 0 ? `${left} more choices are in the trace.` : "Point at an event, or move with the arrow keys.");
  }

  #mark(event, key, end) {
    const { glyph, label, sentence, isSpan, time } = told(event);
    this.events.set(key, event);
    const left = { left: `${((100 * event.at_s) / end).toFixed(4)}%` };
    if (isSpan) left.width = `${((100 * (event.for_s ?? 0)) / end).toFixed(4)}%`;
    return h("button", {
      type: "button", tabindex: -1, class: `${isSpan ? "span" : "moment"} k ${event.kind}`, style: left, data: { key, kind: event.kind },
      "aria-label": `${time}. ${sentence}`,
    }, isSpan ? label : glyph);
  }

  /** Moments that would cover each other stand side by side. */
  #spread(marks, end) {
    let [last, shift] = [-Infinity, 0];
    for (const mark of marks.filter((mark) => mark.classList.contains("moment"))) {
      const at = this.events.get(mark.dataset.key).at_s / end;
      shift = at - last < 0.012 ? shift + 14 : 0;
      last = at;
      if (shift) style(mark, "translate", `${shift}px`);
    }
  }

  #ruler() {
    style(this.inner, "width", `${100 * this.zoom}%`);
    const about = this.end / (5 * this.zoom);
    const power = 10 ** Math.floor(Math.log10(about));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= about);
    const marks = [];
    for (let at = 0; at <= this.end && marks.length < 500; at += step) marks.push(at);
    this.scale.replaceChildren(...marks.map((at) => h("span", { style: { left: `${((100 * at) / this.end).toFixed(4)}%` } }, at ? seconds(at) : "0")));
  }

  #zoom(factor) {
    this.zoom = factor ? Math.min(Math.max(this.zoom * factor, 1), MAX_ZOOM) : 1;
    this.#ruler();
    const focused = this.lanes.querySelector('[tabindex="0"]');
    focused?.scrollIntoView({ inline: "center", block: "nearest" });
  }

  #show(mark) {
    const event = this.events.get(mark.dataset?.key);
    if (!event) return;
    const { sentence, time } = told(event);
    this.detail.replaceChildren(h("i", { class: `k ${event.kind}` }), h("b", {}, time), ` ${sentence}`);
  }

  #key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const zoom = { "+": 2, "=": 2, "-": 0.5, 0: 0 }[event.key];
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (zoom !== undefined) this.#zoom(zoom);
    else if (step && this.lanes.contains(document.activeElement)) this.#move(...step);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #move(down, right) {
    const lane = this.rows.findIndex((marks) => marks.includes(document.activeElement));
    const at = this.rows[lane].indexOf(document.activeElement);
    let mark;
    if (right) mark = this.rows[lane][Math.min(Math.max(at + right, 0), this.rows[lane].length - 1)];
    else {
      const next = this.rows[lane + down]?.length ? this.rows[lane + down] : null;
      const when = this.events.get(document.activeElement.dataset.key).at_s;
      mark = next?.reduce((best, other) => (this.#distance(other, when) < this.#distance(best, when) ? other : best));
    }
    if (!mark) return;
    for (const other of this.rows.flat()) set(other, "tabindex", other === mark ? 0 : -1);
    mark.focus();
    mark.scrollIntoView({ inline: "nearest", block: "nearest" });
  }

  #distance = (mark, when) => Math.abs(this.events.get(mark.dataset.key).at_s - when);

  #words(account) {
    const wasOpen = new Set([...this.words.querySelectorAll("details[open]")].map((box) => box.dataset.name));
    const lists = [{ name: "request", events: account.events }, ...account.choices.slice(0, MAX_LANES).map((choice) => ({ name: `choice ${choice.index}`, events: choice.events, left: choice.num_events_left_out }))];
    this.words.replaceChildren(...lists.map(({ name, events, left }) => h("details", { class: "panel", data: { name }, open: wasOpen.has(name) || (lists.length <= 2 && !this.words.children.length) },
      h("summary", {}, `${name}, in words`),
      h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["at", "for", "what", ""].map((what, at) => h("th", { scope: "col", class: at < 2 ? "n" : null }, what)))),
        h("tbody", {}, events.map((event) => {
          const { label, sentence } = told(event);
          return h("tr", {}, h("td", { class: "n" }, seconds(event.at_s)), h("td", { class: "n" }, event.for_s ? seconds(event.for_s) : ""), h("td", {}, h("i", { class: `k ${event.kind}` }), label), h("td", { class: "sentence" }, sentence));
        })))),
      left ? h("p", { class: "note" }, `${figure(left)} events did not fit and are left out.`) : null)));
  }
}

const longestOf = (account) => account.choices.map((choice) => choice.longest_gap).filter(Boolean).sort((a, b) => b.for_s - a.for_s)[0];
