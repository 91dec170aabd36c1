// Events of a request's life, in words.

import { NONE, figure, plural, seconds } from "./format.js";

const QUEUED = {
  no_permit: "every replica had as much work as it takes",
  no_replica: "no replica was connected",
  not_ready: "no replica was ready",
  returned: "a replica would not have it",
  resume: "it had to go on after its replica was gone",
};
const WAITED = {
  slots: "the batch had no free row",
  blocks: "too few KV blocks were free",
  budget: "the steps' budget went to others",
  prefix: "another request was computing the same prefix",
};
const GAPS = {
  resumed: "it moved to another replica",
  preempted: "it was put out of the batch for want of KV blocks",
  prefill: "prompts of other requests were computed",
  slow_step: "a step took longer than announced",
  large_step: "a step took as long as announced",
  not_scheduled: "steps ran without it",
  idle: "the replica ran no step",
  late: "its tokens were read late by the gateway",
};

const cached = (count) => (count ? `${plural(count, "token")} of it were in the prefix cache` : "nothing of it was in the prefix cache");

/** kind -> [glyph of a moment or "" of a span, its label, its sentence], from the event. */
const KINDS = {
  received: () => ["▾", "received", "The head of the request arrived."],
  read: () => ["", "read", "Its body was read and checked."],
  model: () => ["", "model", "Until a replica of the model had been seen."],
  tokenizer: () => ["", "tokenizer", "Until the model's tokenizer had been loaded."],
  tokenised: (event) => ["", "tokenised", `The prompt became ${plural(event.tokens, "token")}.`],
  queued: (event) => ["", "queued", `In the gateway's queue: ${QUEUED[event.why] ?? event.why}; position ${figure(event.position)}, behind ${plural(event.tokens_ahead, "token")}.`],
  sent: (event) => ["→", "sent", `Given to ${event.replica}${event.resumed_tokens ? `, with ${plural(event.resumed_tokens, "token")} that it had already` : ""}.`],
  waited: (event) => ["", "waited", `Inside the replica: ${WAITED[event.why] ?? event.why}.`],
  admitted: (event) => ["▸", "admitted", `Admitted to the batch; ${cached(event.cached_tokens)}.`],
  chunk: (event) => ["", `chunk ${figure(event.tokens)}`, `${plural(event.tokens, "prompt token")} in ${event.steps > 1 ? plural(event.steps, "step") : `step ${event.step}`} of ${plural(event.rows, "row")}; announced ${seconds(event.announced_s)}.`],
  decode: (event) => ["", `decode ${figure(event.tokens)}`, `${plural(event.tokens, "token")} in steps ${event.first_step} to ${event.last_step}, without a long gap.`],
  gap: (event) => ["", "gap", `No token: ${GAPS[event.cause] ?? event.cause}${event.detail ? ` (${event.detail})` : ""}.`],
  preempted: (event) => ["⏏", "preempted", `Put out of the batch for want of KV blocks; ${plural(event.tokens, "token")} have to be computed again.`],
  returned: (event) => ["↩", "returned", `The replica would not have it now: ${event.code}.`],
  lost: (event) => ["✕", "lost", `${event.replica} was gone: ${event.cause}. What it had computed is in the gateway.`],
  finished: (event) => ["■", "finished", `Finished: ${event.reason}.`],
  failed: (event) => ["✖", "failed", `Failed: ${event.code}.`],
  cancelled: () => ["⊘", "cancelled", "The client went away."],
};

/** {glyph, label, sentence, isSpan} of an event; one of a kind that this page does not know is shown as it is. */
export function told(event) {
  const known = KINDS[event.kind];
  const [glyph, label, sentence] = known ? known(event) : [event.for_s ? "" : "•", event.kind, JSON.stringify(event)];
  const isSpan = glyph === "";
  const time = isSpan ? `${label}, ${seconds(event.for_s ?? 0)} from ${seconds(event.at_s)}` : `${label} at ${seconds(event.at_s)}`;
  return { glyph, label, sentence, isSpan, time };
}

export const gapCause = (cause) => GAPS[cause] ?? cause ?? NONE;
