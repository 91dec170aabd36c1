// The fleet: a card per replica, and what has changed while the page was open.

import { spark } from "./chart.js";
import { Keyed, find, h, say, set, style, svg, tiles } from "./dom.js";
import { NONE, bytes, clock, figure, lasting, percent, plural, seconds } from "./format.js";

const LATE_S = 0.75; // a beat comes ten times a second
const SPARKS = 90;
const MAX_NEWS = 60;
const TOO_LOW = "limit measured too low"; // at the start of the replica, by a machine that was busy
const WORDS = { ready: "ready", loading: "loading", draining: "draining", down: "down", stalled: "stalled", late: "late" };

/** State as the page shows it: what the gateway calls it, and two words of ours. */
export function conditionOf(replica) {
  if (replica.state === "down") return /stall/.test(replica.error ?? "") ? "stalled" : "down";
  return replica.state === "ready" && replica.beat_age_s > LATE_S ? "late" : replica.state;
}

export class Fleet {
  constructor() {
    this.tiles = tiles(find("fleet-tiles"));
    this.cards = new Keyed(find("replicas"), () => new Card());
    this.conditions = null; // replica -> {word, since}
    this.news = [];
  }

  update(history) {
    const state = history.latest;
    this.#note(state);
    const ids = [...new Set(state.replicas.map((replica) => replica.id))];
    this.cards.update(ids);
    for (const replica of state.replicas) {
      const model = state.models[replica.model];
      this.cards.items.get(replica.id).update(replica, model?.card, history.replica(replica), history.sparks.get(replica.id), this.conditions.get(replica.id));
    }
    find("no-replica").hidden = ids.length > 0;
    const sample = history.samples.at(-1);
    const ready = state.replicas.filter((replica) => replica.state === "ready").length;
    const running = state.replicas.reduce((total, replica) => total + (replica.num_running ?? 0), 0);
    const waiting = state.replicas.reduce((total, replica) => total + (replica.num_waiting ?? 0), 0);
    this.tiles([
      ["Ready", `${ready} / ${state.num_replicas}`, state.gateway.is_ready ? "completions are served" : state.gateway.cause],
      ["Rows", figure(running), `running; ${figure(waiting)} wait for a slot`],
      ["Output", figure(sample.output), "tokens/s"],
      ["Prefill", figure(sample.prefill), "prompt tokens/s"],
      ["KV", percent(sample.kv), "of the blocks in use"],
      ["Of the limit", percent(sample.limit), sample.limit === null ? "at rest" : sample.limit > 1 ? TOO_LOW : "of what the hardware allows"],
    ]);
    return { ready, known: state.num_replicas };
  }

  #note(state) {
    const now = Date.now() / 1000;
    const before = this.conditions;
    this.conditions = new Map();
    for (const replica of state.replicas) {
      const word = conditionOf(replica);
      const old = before?.get(replica.id);
      const isSame = old && old.word === word && old.epoch === replica.epoch;
      this.conditions.set(replica.id, isSame ? old : { word, since: now, epoch: replica.epoch });
      if (!before || isSame) continue;
      const cause = replica.error ? `: ${replica.error}` : "";
      this.#say(now, word, !old ? `${replica.id} appeared, ${WORDS[word]}` : old.word === word ? `${replica.id} restarted, ${WORDS[word]}` : `${replica.id}: ${old.word} → ${WORDS[word]}${cause}`);
    }
    for (const id of before?.keys() ?? []) {
      if (!this.conditions.has(id)) this.#say(now, "down", `${id} left the fleet`);
    }
  }

  #say(at, word, text) {
    this.news.unshift(h("li", {}, h("time", {}, clock(at)), " ", h("span", { class: `dot ${word}` }), " ", text));
    this.news.length = Math.min(this.news.length, MAX_NEWS);
    find("news").replaceChildren(...this.news);
  }
}

class Card {
  constructor() {
    this.name = h("h3");
    this.badge = h("span", { class: "badge" });
    this.model = h("span", { class: "muted model" });
    this.cause = h("p", { class: "cause" });
    this.figures = ["output tok/s", "prefill tok/s", "steps/s"].map((what) => ({ what, node: h("b") }));
    this.line = svg("polyline", { class: "line output" });
    this.rows = new Meter("rows");
    this.blocks = new Meter("KV blocks");
    this.limit = new Meter("of the limit", false);
    this.facts = h("dl", { class: "facts" });
    this.ranks = h("tbody");
    this.start = h("p", { class: "note" });
    this.node = h(
      "article", { class: "card" },
      h("header", {}, this.name, this.badge, this.model), this.cause,
      h("div", { class: "body" },
        h("div", { class: "speeds" },
          this.figures.map(({ what, node }) => h("div", {}, node, h("span", { class: "muted" }, what))),
          svg("svg", { class: "spark", viewBox: "0 0 150 30", preserveAspectRatio: "none", "aria-hidden": "true" }, this.line)),
        this.rows.node, this.blocks.node, this.limit.node, this.facts,
        h("table", { class: "ranks" },
          h("thead", {}, h("tr", {}, ["rank", "host", "pid", "step", "age"].map((what) => h("th", { scope: "col" }, what)))), this.ranks),
        this.start),
    );
  }

  update(replica, card, rates, sparks, { word, since }) {
    const stats = replica.stats;
    set(this.node, "data-state", word);
    set(this.node, "data-replica", replica.id);
    set(this.node, "aria-label", `Replica ${replica.id}, ${WORDS[word]}`);
    say(this.name, replica.id);
    say(this.badge, WORDS[word]);
    set(this.badge, "class", `badge ${word}`);
    say(this.model, replica.model ? [replica.model, card?.dtype, card?.determinism].filter(Boolean).join(" · ") : "");
    const isDown = replica.state === "down";
    const lately = Date.now() / 1000 - since;
    say(this.cause, isDown ? `${replica.error || "no connection"} · for ${lasting(lately)}` : word === "late" ? `no beat for ${seconds(replica.beat_age_s)}` : "");
    set(this.node.querySelector(".body"), "hidden", isDown);
    if (isDown) return;
    [rates?.output, rates?.prefill, rates?.steps].forEach((value, at) => say(this.figures[at].node, figure(value)));
    set(this.line, "points", spark(sparks ?? [], SPARKS));
    this.rows.update(replica.num_running, card?.max_num_seqs, `${figure(replica.num_running)} of ${figure(card?.max_num_seqs)}${replica.num_waiting ? `, ${figure(replica.num_waiting)} wait` : ""}`);
    this.blocks.update(replica.blocks_used, replica.blocks_total, `${percent(replica.blocks_used / replica.blocks_total)} · ${figure(replica.blocks_used)} of ${figure(replica.blocks_total)}`);
    const isAtRest = !rates?.steps;
    const fraction = stats?.hardware_fraction;
    this.limit.update(fraction ?? 0, 1, typeof fraction !== "number" ? "the limit is not known" : `${percent(fraction)}${fraction > 1 ? `, ${TOO_LOW}` : isAtRest ? " when it last worked" : ""}`, isAtRest);
    this.#facts(replica, stats, rates);
    this.#ranks(replica);
  }

  #facts(replica, stats, rates) {
    const hits = stats?.prefix_queried ? percent(stats.prefix_hits / stats.prefix_queried) : NONE;
    const [p50, , p99] = rates?.stepTimes ?? [];
    const facts = [
      ["step p50 / p99", `${seconds(p50)} / ${seconds(p99)}`],
      ["took / announced", typeof rates?.ratio === "number" ? `${rates.ratio.toFixed(2)} ×` : NONE],
      ["beat", `${seconds(replica.beat_age_s)} ago`],
      ["running step", replica.step_age_s ? `${seconds(replica.step_age_s)} of ${seconds(replica.announced_s)}` : "at rest"],
      ["prefix hits", hits],
      ["preemptions", figure(stats?.preemptions)],
    ];
    if (!this.values) {
      this.values = facts.map(() => h("dd"));
      this.facts.append(...facts.map(([what], at) => h("div", {}, h("dt", {}, what), this.values[at])));
    }
    facts.forEach(([, value], at) => say(this.values[at], value));
    if (!stats?.phases) return;
    const phases = stats.phases.map(([phase, took_s]) => `${phase} ${seconds(took_s)}`).join(", ");
    say(this.start, phases ? `Started in: ${phases}; read ${bytes(stats.weights_read_bytes)} of weights.` : "");
  }

  #ranks(replica) {
    const rows = replica.ranks.map((rank) => [rank.rank, rank.host, rank.pid, figure(rank.step), seconds(rank.age_s)].map(String));
    if (this.ranks.children.length !== rows.length) {
      this.ranks.replaceChildren(...rows.map((row) => h("tr", {}, row.map(() => h("td")))));
    }
    rows.forEach((row, at) => {
      row.forEach((text, column) => say(this.ranks.children[at].children[column], text));
      set(this.ranks.children[at], "class", replica.ranks[at].age_s > 1.5 ? "late" : null);
    });
  }
}

class Meter {
  /** isLoad: nearly full is a warning. */
  constructor(name, isLoad = true) {
    this.isLoad = isLoad;
    this.bar = h("i");
    this.text = h("span");
    this.meter = h("div", { class: "meter", role: "meter", "aria-label": name, "aria-valuemin": 0 }, this.bar);
    this.node = h("div", { class: "metered" }, h("span", { class: "muted" }, name), this.meter, this.text);
  }

  update(value, most, text, isFaint = false) {
    const share = most ? Math.min(Math.max((value ?? 0) / most, 0), 1) : 0;
    style(this.bar, "width", `${(100 * share).toFixed(1)}%`);
    set(this.meter, "aria-valuenow", value ?? 0);
    set(this.meter, "aria-valuemax", most ?? 1);
    set(this.meter, "aria-valuetext", text);
    set(this.meter, "class", `meter${isFaint ? " faint" : ""}${this.isLoad && share > 0.9 ? " full" : ""}`);
    say(this.text, text);
  }
}

export const unready = ({ ready, known }) => (ready < known ? `${plural(known - ready, "replica")} not ready` : "");
