// Running and recent requests; one of them opened is its timeline.

import { ServerError, getJson } from "./api.js";
import { Keyed, find, h, say, set } from "./dom.js";
import { NONE, clock, figure, plural, seconds } from "./format.js";
import { Poll } from "./poll.js";
import { Timeline } from "./timeline.js";

const LIMIT = 200;
const PERIOD_MS = 1000;
const ENDED = new Set(["finished", "failed", "cancelled", "refused"]);

/** What is refused before it was admitted has no id of its own, but the id of its HTTP request. */
const nameOf = (entry) => entry.id || entry.request_id;

const kindOf = ({ endpoint, stream, n }) => `${endpoint.includes("chat") ? "chat" : "completion"}${stream ? " stream" : ""}${n > 1 ? ` ×${n}` : ""}`;

export class Requests {
  constructor() {
    this.rows = new Keyed(find("requests").tBodies[0], (id) => new Row(id));
    this.data = [];
    this.poll = new Poll(() => getJson(`v1/requests?limit=${LIMIT}${this.#state()}`), PERIOD_MS, (list) => this.#heard(list), (error) => this.#failed(error));
    this.timeline = new Timeline(find("timeline"));
    find("filter").addEventListener("input", () => this.#show());
    find("filter-state").addEventListener("change", () => this.poll.start());
    find("request-filters").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#move(0, 0);
    });
    find("filter").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") {
        event.preventDefault();
        this.#move(0, 0);
      }
    });
    find("requests").addEventListener("keydown", (event) => this.#key(event));
  }

  /** id: of a request whose timeline is wanted, "" = the list. */
  open(id) {
    find("request-list").hidden = id !== "";
    find("timeline").hidden = id === "";
    if (id) {
      this.poll.stop();
      this.timeline.open(id);
      return;
    }
    const last = this.timeline.id;
    this.timeline.close();
    this.poll.start();
    if (last) this.rows.items.get(last)?.link.focus(); // back from there: go on where you were
  }

  close() {
    this.poll.stop();
    this.timeline.close();
  }

  focusFilter() {
    find("filter").focus();
    find("filter").select();
  }

  #state() {
    const { value } = find("filter-state");
    return value ? `&state=${value}` : "";
  }

  #heard(list) {
    this.data = list.data;
    this.running = list.num_running;
    this.cause = "";
    this.#show();
  }

  #failed(error) {
    this.cause = error instanceof ServerError ? error.message : "";
    this.#show();
  }

  #show() {
    const words = find("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = this.data.filter((entry) => {
      const text = [entry.id, entry.request_id, entry.model, entry.replica, entry.endpoint, entry.state, entry.error_code].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    this.rows.update([...new Set(shown.map(nameOf))]);
    shown.forEach((entry) => this.rows.items.get(nameOf(entry)).update(entry));
    const newest = shown.length && !find("requests").contains(document.activeElement) ? nameOf(shown[0]) : null;
    if (newest) this.#tabStop(newest);
    say(find("request-count"), `${plural(shown.length, "request")}${words.length ? ` of ${figure(this.data.length)}` : ""}, ${figure(this.running)} running`);
    const empty = find("no-request");
    empty.hidden = shown.length > 0;
    say(empty, this.cause || (this.data.length ? "No request fits the filter." : "No request yet. The playground makes some."));
  }

  /** One row at a time takes part in the tab order; arrow keys reach the others. */
  #tabStop(id) {
    for (const [other, row] of this.rows.items) set(row.link, "tabindex", other === id ? 0 : -1);
  }

  #key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const links = [...find("requests").querySelectorAll("tbody a")];
    const at = links.indexOf(document.activeElement);
    if (at === 0 && step === -1) find("filter").focus();
    else this.#move(at, step);
  }

  #move(at, step) {
    const links = [...find("requests").querySelectorAll("tbody a")];
    const link = links[Math.min(Math.max(at + step, 0), links.length - 1)];
    if (!link) return;
    this.#tabStop(link.dataset.id);
    link.focus();
  }
}

class Row {
  constructor(id) {
    this.link = h("a", { href: `#requests/${encodeURIComponent(id)}`, tabindex: -1, data: { id } }, id);
    this.state = h("span", { class: "badge" });
    const cell = (kind = "") => h("td", { class: kind });
    this.cells = [cell("wide"), cell("wide name"), cell("wide"), cell(), cell("n"), cell("n"), cell("n wide"), cell("n"), cell("n wide"), cell("n"), cell("n wide")];
    this.node = h("tr", { on: { click: (event) => this.#click(event) } }, h("th", { scope: "row" }, this.link), h("td", {}, this.state), this.cells);
  }

  #click(event) {
    if (event.target !== this.link && getSelection().isCollapsed) this.link.click();
  }

  update(entry) {
    say(this.state, entry.error_code ? `${entry.state}: ${entry.error_code}` : entry.state);
    set(this.state, "class", `badge ${entry.state}`);
    set(this.node, "class", ENDED.has(entry.state) ? "ended" : "running");
    const values = [
      kindOf(entry), entry.model, entry.replica, clock(entry.arrived_at), seconds(entry.elapsed_s), seconds(entry.time_to_first_token_s),
      seconds(entry.longest_gap_s), figure(entry.prompt_tokens), ENDED.has(entry.state) ? figure(entry.cached_tokens) : NONE, figure(entry.completion_tokens), figure(entry.num_resumes),
    ];
    values.forEach((value, at) => say(this.cells[at], value || NONE));
    set(this.cells[1], "title", entry.model);
  }
}
