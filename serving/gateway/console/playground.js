// The playground: one request by hand, streamed, measured in the browser, shown as the server sends it.

import { ServerError, getJson } from "./api.js";
import { find, h, say, tiles } from "./dom.js";
import { NONE, figure, seconds } from "./format.js";
import { generate } from "./stream.js";
import { Answer, fillLegend } from "./tokens.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "frequency_penalty", "presence_penalty", "repetition_penalty"];
const MAX_TURNS = 200; // of a chat that are kept on the page
const PATHS = { chat: "v1/chat/completions", completion: "v1/completions" };

/** What is no number goes to the server as it was typed: its word on it counts. */
const numberOr = (text) => (Number.isFinite(Number(text)) ? Number(text) : text);

/**
 * Why a stream broke. The server's last event may be lost with the connection (a browser drops what it has not yet
 * handed over); then the request's own account knows.
 */
async function causeOf(error, id) {
  for (let tries = 0; tries < 3 && id && !(error instanceof ServerError); tries += 1) {
    const account = await getJson(`v1/requests/${encodeURIComponent(id)}`).catch(() => null);
    if (account?.error) return new ServerError(200, account.error);
    await new Promise((done) => setTimeout(done, 150));
  }
  return error;
}

export class Playground {
  constructor() {
    this.form = find("ask");
    this.tiles = tiles(find("measured"));
    this.turns = []; // messages of the chat so far
    this.running = null; // AbortController
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.send();
    });
    this.form.addEventListener("input", () => this.#showCurl());
    this.form.addEventListener("change", () => this.#showKind());
    find("stop").addEventListener("click", () => this.stop());
    find("fresh").addEventListener("click", () => this.#clear());
    find("copy").addEventListener("click", () => this.#copy());
    fillLegend(find("legend"));
    find("parameters").open = matchMedia("(min-width: 1000px)").matches;
    this.#measure({});
    this.#showKind();
  }

  get kind() {
    return this.form.elements.kind.value;
  }

  /** Names of the served models; asked for when the view opens. */
  async open() {
    try {
      const reply = await fetch("v1/models", { cache: "no-store", signal: AbortSignal.timeout(5000) });
      const { data } = await reply.json();
      const select = find("p-model");
      const chosen = select.value;
      select.replaceChildren(...data.map(({ id }) => h("option", {}, id)));
      if (data.some(({ id }) => id === chosen)) select.value = chosen;
      this.#showCurl();
    } catch {
      // the banner says that the server is gone; the list stays as it was
    }
  }

  /** JSON text of the request. An integer of any length stays itself, which a number of JavaScript would not. */
  body(isStream = true) {
    const given = new FormData(this.form);
    const text = (name) => given.get(name) ?? "";
    const body = { model: text("model") };
    if (this.kind === "chat") {
      const system = text("system") ? [{ role: "system", content: text("system") }] : [];
      body.messages = [...system, ...this.turns, { role: "user", content: text("prompt") }];
    } else body.prompt = text("prompt");
    for (const name of NUMBERS) if (text(name).trim() !== "") body[name] = numberOr(text(name));
    const stop = text("stop").split("\n").filter(Boolean);
    if (stop.length) body.stop = stop;
    if (given.has("ignore_eos")) body.ignore_eos = true;
    const logprobs = text("logprobs").trim();
    if (logprobs && this.kind === "chat") Object.assign(body, { logprobs: true, top_logprobs: numberOr(logprobs) });
    else if (logprobs) body.logprobs = numberOr(logprobs);
    if (isStream) Object.assign(body, { stream: true, stream_options: { include_usage: true } });
    const seed = text("seed").trim();
    if (!seed) return JSON.stringify(body);
    return `${JSON.stringify(body).slice(0, -1)},"seed":${/^-?\d{1,20}$/.test(seed) ? BigInt(seed) : JSON.stringify(seed)}}`;
  }

  /** The request as a shell command: quoted so that the shell passes every character on as it is. */
  curl() {
    const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
    const key = this.form.elements.key.value ? " \\\n  -H 'Authorization: Bearer YOUR_API_KEY'" : "";
    const url = new URL(PATHS[this.kind], document.baseURI).href;
    return `curl -N ${quoted(url)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(this.body())}`;
  }

  async send() {
    if (this.running) return;
    const isChat = this.kind === "chat";
    const prompt = this.form.elements.prompt.value;
    const controller = (this.running = new AbortController());
    const run = { began: performance.now(), pieces: 0, ends: new Set(), answers: new Map(), path: PATHS[this.kind] };
    this.#begin(run, prompt, isChat);
    try {
      await generate(run.path, this.body(), this.form.elements.key.value, controller.signal, {
        head: (reply) => (run.request = reply.headers.get("x-request-id")),
        id: (id) => this.#name(run, id),
        comment: (text) => this.#note(run, text),
        usage: (usage) => (run.usage = usage),
        piece: (piece, now) => this.#add(run, piece, now),
      });
      run.ended = "complete";
      if (isChat) this.#remember(prompt, run.answers.get(0)?.text ?? "");
    } catch (error) {
      if (controller.signal.aborted) run.ended = "stopped by you";
      else {
        run.ended = "failed";
        this.#fail(run, await causeOf(error, run.id));
      }
    } finally {
      this.running = null;
      this.#end(run);
    }
  }

  /** Whether there was anything to stop. */
  stop() {
    this.running?.abort();
    return this.running !== null;
  }

  #begin(run, prompt, isChat) {
    find("run-error").hidden = true;
    for (const field of this.form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    find("send").disabled = true;
    find("stop").disabled = false;
    find("legend").hidden = this.form.elements.logprobs.value.trim() === "";
    run.link = h("span", { class: "note" });
    run.choices = h("div", { "aria-busy": "true" });
    run.node = h("article", { class: "turn" }, h("p", { class: "asked" }, h("b", {}, isChat ? "user" : "prompt"), " ", h("span", {}, prompt)), run.choices, run.link);
    const talk = find("talk");
    if (!isChat || !this.turns.length) talk.replaceChildren();
    while (talk.children.length >= MAX_TURNS) talk.firstChild.remove();
    talk.append(run.node);
    this.#note(run, "sent");
    this.#showCurl(); // stays as it was sent until something is typed
    this.ticking = setInterval(() => this.#measure(run), 200);
  }

  #add(run, piece, now) {
    if (!run.answers.has(piece.index)) {
      const answer = new Answer(`choice ${piece.index}`);
      run.answers.set(piece.index, answer);
      const end = h("span", { class: "end muted" });
      run.ends.add({ index: piece.index, end });
      const node = h("div", { class: "choice", data: { choice: piece.index } }, h("p", { class: "muted" }, `choice ${piece.index} `, end), answer.node);
      const next = [...run.choices.children].find((other) => Number(other.dataset.choice) > piece.index);
      run.choices.insertBefore(node, next ?? null);
    }
    if (piece.text || piece.tokens.length) {
      run.answers.get(piece.index).add(piece);
      run.first ??= now;
      run.longest = Math.max(run.longest ?? 0, run.last === undefined ? 0 : now - run.last);
      run.last = now;
      run.pieces += Math.max(piece.tokens.length, 1);
      if (run.pieces === 1) this.#note(run, "streaming");
    }
    if (piece.finish) say([...run.ends].find(({ index }) => index === piece.index).end, `finished: ${piece.finish}`);
  }

  #name(run, id) {
    if (run.id === id) return;
    run.id = id;
    run.link.replaceChildren("request ", h("a", { href: `#requests/${encodeURIComponent(id)}` }, id), ": its timeline");
  }

  #note(run, text) {
    say(find("run-note"), text);
    this.#measure(run);
  }

  #measure({ began, first, last, longest, pieces, usage, ended }) {
    const tokens = usage?.completion_tokens ?? pieces;
    const spent = first === undefined ? NaN : (last - first) / 1000;
    const speed = tokens > 1 && spent > 0 ? (tokens - 1) / spent : NaN;
    const until = ended || began === undefined ? last : performance.now();
    this.tiles([
      ["First token", first === undefined ? NONE : seconds((first - began) / 1000), "from the send"],
      ["Speed", figure(speed), "tokens/s after the first"],
      ["Tokens", tokens === undefined ? NONE : figure(tokens), usage ? `after ${figure(usage.prompt_tokens)} of prompt, ${figure(usage.prompt_tokens_details?.cached_tokens ?? 0)} cached` : "so far"],
      ["Longest gap", longest ? seconds(longest / 1000) : NONE, "between two arrivals"],
      ["In all", began === undefined || until === undefined ? NONE : seconds((until - began) / 1000), ended ?? (began === undefined ? "" : "running")],
    ]);
  }

  #remember(prompt, text) {
    this.turns.push({ role: "user", content: prompt }, { role: "assistant", content: text });
    this.form.elements.prompt.value = "";
    find("fresh").disabled = false;
  }

  #clear() {
    this.turns = [];
    find("talk").replaceChildren();
    find("fresh").disabled = true;
    this.#showCurl();
    this.form.elements.prompt.focus();
  }

  #fail(run, error) {
    const told = find("run-error");
    const facts = error instanceof ServerError ? [`HTTP ${error.status}`, error.type, error.code && `code ${error.code}`, error.param && `parameter ${error.param}`].filter(Boolean) : [error.name];
    told.replaceChildren(h("strong", {}, run.first === undefined ? "Refused or failed. " : "The stream failed. "), h("span", {}, error.message), h("span", { class: "muted" }, ` ${facts.join(" · ")}`));
    told.hidden = false;
    const field = error.param && this.form.elements[{ messages: "prompt", top_logprobs: "logprobs", max_completion_tokens: "max_tokens" }[error.param] ?? error.param];
    if (field instanceof HTMLElement) {
      field.setAttribute("aria-invalid", "true");
      const box = field.closest("details");
      if (box) box.open = true;
      field.focus();
    }
    if (!run.id && run.request) this.#name(run, run.request);
  }

  #end(run) {
    clearInterval(this.ticking);
    run.choices.removeAttribute("aria-busy");
    find("send").disabled = false;
    find("stop").disabled = true;
    this.#note(run, run.ended);
  }

  #showKind() {
    const isChat = this.kind === "chat";
    for (const node of document.querySelectorAll(".only-chat")) node.hidden = !isChat;
    say(find("p-prompt-label"), isChat ? "Message" : "Prompt");
    this.#showCurl();
  }

  #showCurl() {
    say(find("curl"), this.curl());
  }

  async #copy() {
    const text = find("curl");
    getSelection().selectAllChildren(text);
    const isDone = await navigator.clipboard?.writeText(text.textContent).then(() => true, () => false);
    say(find("copy"), isDone ? "Copied" : "Selected: press Ctrl C");
    setTimeout(() => say(find("copy"), "Copy"), 2000);
  }
}
