// What differences between polls say: rates and percentiles. Bounded: SAMPLES points, WINDOW_S of documents.

export const SAMPLES = 600;
const SPARKS = 90;
const RATE_S = 3; // replicas tell their counts twice a second: shorter windows would show the beat, not the load
const WINDOW_S = 10; // of percentiles
const QUANTILES = [0.5, 0.95, 0.99];

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** Growth of a counter; one that is smaller than before has begun anew. */
export const growth = (now, before) => (now >= before ? now - before : now);

/**
 * Quantile of counts per bucket, straight lines within buckets. null when nothing was counted; values above the last
 * bound are shown as that bound.
 */
export function quantile(bounds, counts, q) {
  const total = sum(counts);
  if (!total) return null;
  let below = 0;
  for (let at = 0; at < bounds.length; at += 1) {
    if (below + counts[at] >= q * total) {
      const lower = at ? bounds[at - 1] : 0;
      return lower + (bounds[at] - lower) * Math.max((q * total - below) / counts[at], 0);
    }
    below += counts[at];
  }
  return bounds.at(-1);
}

const grownCounts = (now, before) => now.map((count, at) => growth(count, before?.[at] ?? 0));

/** Same process as before? A replica that restarted has another epoch; its counts begin at nothing. */
const sameReplica = (document, replica) =>
  document.replicas.find((other) => other.id === replica.id && other.epoch === replica.epoch && other.stats);

export class History {
  constructor() {
    this.documents = []; // of the last WINDOW_S
    this.samples = [];
    this.sparks = new Map(); // replica -> its output rates
  }

  get latest() {
    return this.documents.at(-1) ?? null;
  }

  /** The newest document that is at least `seconds` older than the latest, else the oldest. */
  #before(seconds) {
    const until = this.latest.now - seconds + 0.2;
    return this.documents.findLast((document) => document.now <= until) ?? this.documents[0];
  }

  add(document) {
    if (this.latest && document.gateway.uptime_s < this.latest.gateway.uptime_s) this.documents = [];
    this.documents.push(document);
    while (this.documents.length > 2 && document.now - this.documents[1].now >= WINDOW_S) this.documents.shift();
    this.samples.push(this.#sample(document));
    if (this.samples.length > SAMPLES) this.samples.shift();
    for (const replica of document.replicas) {
      const sparks = this.sparks.get(replica.id) ?? [];
      sparks.push(this.replica(replica)?.output ?? 0);
      if (sparks.length > SPARKS) sparks.shift();
      this.sparks.set(replica.id, sparks);
    }
    for (const id of this.sparks.keys()) {
      if (!document.replicas.some((replica) => replica.id === id)) this.sparks.delete(id);
    }
  }

  /** Rates and step times of one replica of the latest document; null when it tells no counts, or not for long enough. */
  replica(replica) {
    const { bounds, now } = this.latest;
    const before = this.#before(RATE_S);
    const earlier = sameReplica(before, replica);
    const first = sameReplica(this.documents[0], replica) ?? earlier;
    const stats = replica.stats;
    if (!stats || !earlier || before.now >= now) return null;
    const rate = (name) => growth(stats[name], earlier.stats[name]) / (now - before.now);
    const steps = grownCounts(stats.step_counts, first.stats.step_counts);
    const ratios = grownCounts(stats.ratio_counts, first.stats.ratio_counts);
    const known = steps.length === bounds.step_seconds.length + 1 && ratios.length === bounds.ratios.length + 1;
    return {
      prefill: rate("prefill_tokens"),
      output: rate("decode_tokens"),
      steps: rate("steps"),
      stepTimes: known ? QUANTILES.map((q) => quantile(bounds.step_seconds, steps, q)) : QUANTILES.map(() => null),
      ratio: known ? quantile(bounds.ratios, ratios, 0.5) : null,
    };
  }

  #sample(document) {
    const before = this.#before(RATE_S);
    const first = this.documents[0];
    const elapsed = document.now - before.now;
    const models = Object.entries(document.models);
    const per_s = (read) => (elapsed > 0 ? sum(models.map(([name, model]) => growth(read(model), read(before.models[name] ?? model)))) / elapsed : null);
    const counted = (table) => (elapsed > 0 ? growth(sum(Object.values(document[table])), sum(Object.values(before[table]))) / elapsed : null);
    const quantiles = (name) => {
      const grown = models.map(([model, series]) => grownCounts(series[name].counts, first.models[model]?.[name].counts ?? series[name].counts));
      const counts = grown.length ? grown[0].map((_, at) => sum(grown.map((row) => row[at]))) : [];
      return QUANTILES.map((q) => quantile(document.bounds.seconds, counts, q));
    };
    const rates = document.replicas.map((replica) => this.replica(replica)).filter(Boolean);
    const up = document.replicas.filter((replica) => replica.state !== "down");
    const ofUp = (name) => sum(up.map((replica) => replica[name] ?? 0));
    const limits = up.map((replica) => replica.stats?.hardware_fraction).filter((value) => typeof value === "number");
    return {
      at: Date.now() / 1000,
      output: per_s((model) => model.generation_tokens),
      prefill: rates.length ? sum(rates.map((rate) => rate.prefill)) : null,
      ended: per_s((model) => sum(model.request_latency.counts)),
      ttft: quantiles("time_to_first_token"),
      itl: quantiles("inter_token_latency"),
      queue: quantiles("queue_time"),
      running: sum(models.map(([, model]) => model.num_running)),
      waiting: sum(models.map(([, model]) => model.num_waiting)),
      queued: sum(models.map(([, model]) => model.queued_choices)),
      errors: counted("errors"),
      sheds: counted("sheds"),
      broken: per_s((model) => sum(Object.values(model.broken))),
      kv: ofUp("blocks_total") ? ofUp("blocks_used") / ofUp("blocks_total") : null,
      limit: limits.length && rates.some((rate) => rate.steps > 0) ? sum(limits) / limits.length : null,
      lag: quantile(document.bounds.loop_lag, grownCounts(document.gateway.loop_lag.counts, first.gateway.loop_lag.counts), 0.99),
    };
  }
}
