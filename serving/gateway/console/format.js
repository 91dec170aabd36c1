// Numbers as people read them. "–" is what is not known.

export const NONE = "–";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Three figures at most. */
export function figure(value) {
  if (!isNumber(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value.toFixed(size >= 10 ? 1 : 2);
}

export function seconds(value) {
  if (!isNumber(value)) return NONE;
  if (value === 0) return "0 s";
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 1) return `${figure(value * 1000)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return lasting(value);
}

/** Whole units, for ages: "12 s", "3 min 05 s", "2 h 10 min". */
export function lasting(value) {
  if (!isNumber(value)) return NONE;
  const whole = Math.round(value);
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 100) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole / 60) % 60)} min`;
}

export const percent = (value) => (isNumber(value) ? `${Math.round(value * 100)} %` : NONE);

export function bytes(value) {
  if (!isNumber(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; value >= 1024 && at < units.length - 1; at += 1) value /= 1024;
  return `${figure(value)} ${units[at]}`;
}

/** Of unix seconds, in the reader's own zone: "14:03:07". */
export function clock(unix_s) {
  return isNumber(unix_s) ? new Date(unix_s * 1000).toLocaleTimeString("en-GB") : NONE;
}

export const plural = (count, word) => `${figure(count)} ${word}${count === 1 ? "" : "s"}`;
