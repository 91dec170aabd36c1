// Asking again and again: once per period, never two at a time, not while the page is hidden.

export class Poll {
  /** ask() -> promise; heard(answer); failed(error). All optional work happens in the callbacks. */
  constructor(ask, period_ms, heard, failed = () => {}) {
    Object.assign(this, { ask, period_ms, heard, failed });
    this.isWanted = false;
    this.round = 0; // answers of earlier rounds are dropped
    this.timer = 0;
    document.addEventListener("visibilitychange", () => this.isWanted && this.#begin());
  }

  start() {
    this.isWanted = true;
    this.#begin();
  }

  stop() {
    this.isWanted = false;
    this.round += 1;
    clearTimeout(this.timer);
  }

  #begin() {
    this.round += 1;
    clearTimeout(this.timer);
    if (!document.hidden) this.#ask(this.round);
  }

  async #ask(round) {
    const began = performance.now();
    let told;
    try {
      const answer = await this.ask();
      told = () => this.heard(answer);
    } catch (error) {
      told = () => this.failed(error);
    }
    if (round !== this.round) return;
    this.timer = setTimeout(() => this.#ask(round), Math.max(this.period_ms - (performance.now() - began), 50));
    told();
  }
}
