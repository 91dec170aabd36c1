// Live: what the fleet does now, over the last minutes, and what has been counted since the start.

import { Chart } from "./chart.js";
import { find, h, tiles } from "./dom.js";
import { NONE, figure, percent, seconds } from "./format.js";

const three = (name) => ["p50", "p95", "p99"].map((word, at) => ({ name: word, tone: ["low", "middle", "high"][at], read: (sample) => sample[name][at] }));
const WINDOW = "Of the last 10 s, from the counts per bucket of the gateway's histograms.";

export class Live {
  constructor() {
    this.tiles = tiles(find("live-tiles"));
    this.charts = [
      new Chart("Throughput", [
        { name: "output", tone: "output", read: (sample) => sample.output },
        { name: "prefill", tone: "prefill", read: (sample) => sample.prefill },
      ], figure, { least: 10, note: "Tokens/s over 3 s: output as the gateway received it, prompt tokens as the replicas computed them." }),
      new Chart("Requests", [
        { name: "running", tone: "output", read: (sample) => sample.running },
        { name: "no token yet", tone: "wait", read: (sample) => sample.waiting },
        { name: "choices queued", tone: "high", read: (sample) => sample.queued },
      ], figure, { least: 4, note: "At the moment of the poll. Queued: held in the gateway until a replica has room." }),
      new Chart("Time to first token", three("ttft"), seconds, { least: 0.02, note: WINDOW }),
      new Chart("Inter-token latency", three("itl"), seconds, { least: 0.01, note: WINDOW }),
      new Chart("KV and limit", [
        { name: "KV blocks owned", tone: "wait", read: (sample) => sample.kv },
        { name: "of the hardware's limit", tone: "prefill", read: (sample) => sample.limit },
      ], percent, { least: 1, note: "All connected replicas together." }),
      new Chart("Errors", [
        { name: "refused or failed", tone: "bad", read: (sample) => sample.errors },
        { name: "of those, no capacity", tone: "wait", read: (sample) => sample.sheds },
        { name: "broken streams", tone: "high", read: (sample) => sample.broken },
      ], figure, { least: 1, note: "Per second, over 3 s." }),
    ];
    find("charts").replaceChildren(...this.charts.map((chart) => chart.node));
  }

  update(history) {
    const sample = history.samples.at(-1);
    const [ttft50, , ttft99] = sample.ttft;
    const [itl50, , itl99] = sample.itl;
    this.tiles([
      ["Output", figure(sample.output), "tokens/s"],
      ["Prefill", figure(sample.prefill), "prompt tokens/s"],
      ["First token", seconds(ttft50), `p99 ${seconds(ttft99)}`],
      ["Inter-token", seconds(itl50), `p99 ${seconds(itl99)}`],
      ["Running", figure(sample.running), `${figure(sample.waiting)} without a token`],
      ["Queued", figure(sample.queued), `queue p99 ${seconds(sample.queue[2])}`],
      ["Requests ended", figure(sample.ended), "per second"],
      ["Errors", figure(sample.errors), "per second"],
    ]);
    for (const chart of this.charts) chart.update(history.samples);
    this.#counts(history.latest, sample);
  }

  #counts(state, sample) {
    const { gateway } = state;
    const tables = [
      ["Gateway", { "open connections": gateway.num_connections, "event loop late, p99": seconds(sample.lag) }],
      ["Replies by HTTP status", state.responses],
      ["Errors by code", state.errors],
      ["No capacity, by reason", state.sheds],
      ["Faults survived or died of", state.faults],
      ["Links to replicas that ended", state.links_ended],
    ];
    for (const [name, model] of Object.entries(state.models)) {
      tables.push([name, {
        "output tokens": model.generation_tokens,
        "prompt tokens": model.prompt_tokens,
        "of those, from the prefix cache": model.cached_tokens,
        "resumed choices": model.num_resumes,
        "clients that left": model.num_disconnects,
        ...prefixed("finished: ", model.finished),
        ...prefixed("broken: ", model.broken),
      }]);
    }
    const key = JSON.stringify(tables);
    if (key === this.countsKey) return;
    this.countsKey = key;
    find("counts").replaceChildren(...tables.map(([title, counts]) => {
      const rows = Object.entries(counts);
      return h("table", {},
        h("caption", {}, title),
        h("tbody", {}, rows.length
          ? rows.map(([what, count]) => h("tr", {}, h("th", { scope: "row" }, what), h("td", {}, typeof count === "number" ? figure(count) : count ?? NONE)))
          : h("tr", {}, h("td", { class: "muted" }, "none"))));
    }));
  }
}

const prefixed = (prefix, counts) => Object.fromEntries(Object.entries(counts).map(([name, count]) => [prefix + name, count]));
