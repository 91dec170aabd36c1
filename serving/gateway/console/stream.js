// One streamed generation: fetch, Server-Sent Events, and one shape for what both endpoints send.

import { ServerError, errorOf } from "./api.js";

/** Cuts a text that arrives in pieces into SSE events: {data} or {comment}. */
export class EventCutter {
  #rest = "";
  #data = [];

  *feed(piece) {
    this.#rest += piece;
    const lines = this.#rest.split("\n");
    this.#rest = lines.pop();
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line === "") {
        if (this.#data.length) yield { data: this.#data.join("\n") };
        this.#data = [];
      } else if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      else if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

/** A choice of an event of either endpoint: {index, text, tokens: [{token, logprob, top: [[token, logprob]]}], finish}. */
export function pieceOf(choice) {
  const { index, finish_reason: finish } = choice;
  const logprobs = choice.logprobs;
  if (choice.delta) {
    const tokens = (logprobs?.content ?? []).map((entry) => ({
      token: entry.token, logprob: entry.logprob, top: entry.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
    return { index, text: choice.delta.content ?? "", tokens, finish };
  }
  const tokens = (logprobs?.tokens ?? []).map((token, at) => ({
    token, logprob: logprobs.token_logprobs[at], top: Object.entries(logprobs.top_logprobs?.[at] ?? {}),
  }));
  return { index, text: choice.text ?? "", tokens, finish };
}

/**
 * Sends a request (`body` is JSON text) and tells what comes: on.head(reply), on.piece(piece, now), on.comment(text), on.usage(usage), on.id(id).
 * now: performance.now() of the arrival. Returns when the server has said [DONE]. Throws ServerError for a refusal and for
 * an error inside the stream, and Error for a stream that ends without [DONE].
 */
export async function generate(path, body, key, signal, on) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const reply = await fetch(path, { method: "POST", headers, body, signal, cache: "no-store" });
  on.head(reply);
  if (!reply.ok) throw await errorOf(reply);
  const cutter = new EventCutter();
  const decoder = new TextDecoder();
  const reader = reply.body.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The stream ended without [DONE]: the answer is not complete.");
    const now = performance.now();
    for (const event of cutter.feed(decoder.decode(value, { stream: true }))) {
      if (event.comment !== undefined) on.comment(event.comment);
      else if (event.data === "[DONE]") return;
      else take(JSON.parse(event.data), now, reply, on);
    }
  }
}

function take(document, now, reply, on) {
  if (document.error) throw new ServerError(reply.status, document.error);
  on.id(document.id);
  for (const choice of document.choices) on.piece(pieceOf(choice), now);
  if (document.usage) on.usage(document.usage);
}
