// An answer, token by token: how likely each was, and what else it might have been.

import { find, h, say, style } from "./dom.js";

const MAX_TOKENS = 20000; // shown one by one; what comes after them is plain text
const SHADES = [[0.9, "p90"], [0.5, "p50"], [0.2, "p20"], [0.05, "p5"], [0, "p0"]];
export const LEGEND = [["p90", "≥ 90 %"], ["p50", "≥ 50 %"], ["p20", "≥ 20 %"], ["p5", "≥ 5 %"], ["p0", "< 5 %"]];

const shadeOf = (probability) => SHADES.find(([least]) => probability >= least)?.[1] ?? "p0";

/** A token so that its spaces and line ends can be seen. */
export const visible = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍") || "∅";

/** The text of one choice. `node.textContent` is exactly the text that the server has sent. */
export class Answer {
  constructor(label) {
    this.node = h("div", { class: "text", tabindex: 0, role: "group", "aria-label": `${label}; arrow keys move from token to token` });
    this.text = "";
    this.tokens = new Map(); // span -> its entries
    this.plain = null; // the text node that plain text is appended to
    this.held = []; // tokens that have no text of their own yet
    this.current = null;
    this.node.addEventListener("pointerover", (event) => this.#point(event.target.closest?.("span")));
    this.node.addEventListener("pointerleave", () => this.#point(null));
    this.node.addEventListener("blur", () => this.#point(null));
    this.node.addEventListener("keydown", (event) => this.#key(event));
  }

  add({ text, tokens }) {
    this.text += text;
    if (!tokens.length || this.tokens.size >= MAX_TOKENS) {
      this.#addPlain(text);
      return;
    }
    this.plain = null;
    if (tokens.map(({ token }) => token).join("") === text) for (const token of tokens) this.#addSpan(token.token, [token]);
    else this.#addSpan(text, tokens); // parts of characters, or a stop string held back: they share a text
  }

  #addPlain(text) {
    if (!text) return;
    if (!this.plain) {
      this.plain = document.createTextNode("");
      this.node.append(this.plain);
    }
    this.plain.appendData(text);
  }

  #addSpan(text, entries) {
    const least = Math.min(...entries.map(({ logprob }) => logprob));
    const span = h("span", { class: `token ${shadeOf(Math.exp(least))}` }, text);
    span.dataset.logprobs = JSON.stringify(entries.map(({ token, logprob }) => [token, logprob]));
    if (!text) span.dataset.mark = entries.map(({ token }) => visible(token)).join("");
    this.tokens.set(span, entries);
    this.node.append(span);
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step !== undefined && this.tokens.size) {
      event.preventDefault();
      event.stopPropagation();
      const spans = [...this.tokens.keys()];
      const at = this.current ? spans.indexOf(this.current) + step : step > 0 ? 0 : spans.length - 1;
      this.#point(spans[Math.min(Math.max(at, 0), spans.length - 1)]);
    } else if (event.key === "Escape" && this.current) {
      event.stopPropagation();
      this.#point(null);
    }
  }

  #point(span) {
    this.current?.classList.remove("current");
    this.current = span && this.tokens.has(span) ? span : null;
    this.current?.classList.add("current");
    if (this.current) openPopup(this.current, this.tokens.get(this.current));
    else find("popup").hidden = true;
  }
}

function openPopup(span, entries) {
  const popup = find("popup");
  popup.replaceChildren(...entries.map(({ token, logprob, top }) => {
    const others = [...top].sort((a, b) => b[1] - a[1]);
    const rows = others.some(([other]) => other === token) ? others : [[token, logprob], ...others].sort((a, b) => b[1] - a[1]);
    return h("table", {},
      h("caption", {}, h("code", {}, visible(token)), ` log-probability ${logprob.toFixed(4)}`),
      h("tbody", {}, rows.map(([other, value]) => h("tr", { class: other === token ? "taken" : null },
        h("th", { scope: "row" }, h("code", {}, visible(other)), other === token ? " ✓" : ""),
        h("td", {}, `${(100 * Math.exp(value)).toFixed(value > Math.log(0.1) ? 1 : 2)} %`),
        h("td", {}, h("span", { class: "meter" }, h("i", { style: { width: `${(100 * Math.exp(value)).toFixed(1)}%` } })))))));
  }));
  popup.hidden = false;
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { width, height } = popup.getBoundingClientRect();
  const left = Math.min(Math.max(place.left, 8), innerWidth - width - 8);
  const isBelow = place.bottom + height + 10 < innerHeight;
  style(popup, "left", `${Math.max(left, 8)}px`);
  style(popup, "top", `${isBelow ? place.bottom + 6 : Math.max(place.top - height - 6, 8)}px`);
}

export function fillLegend(node) {
  node.replaceChildren("Probability of a token: ", ...LEGEND.map(([shade, words]) => h("span", { class: `token ${shade}` }, words)));
  say(node.appendChild(h("span", { class: "muted" })), "point at one, or move with the arrow keys");
}
