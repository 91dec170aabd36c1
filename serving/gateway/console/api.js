// Questions to the gateway. Only these carry the operator token; the playground's requests do not.

const KEY = "argosy.operator_token";
const TIMEOUT_MS = 5000;

/** Told when the server wants an operator: `locked` events, `detail` is the server's message. */
export const door = new EventTarget();

/** What the server said in place of an answer. */
export class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered ${status}.`);
    Object.assign(this, { status, code: error?.code ?? "", param: error?.param ?? null, type: error?.type ?? "" });
  }

  get isLocked() {
    return this.status === 401 || this.status === 403;
  }
}

/** The error object of a reply that is not a success, whatever its body is. */
export async function errorOf(reply) {
  const document = await reply.json().catch(() => null);
  return new ServerError(reply.status, document?.error);
}

function token() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** Keeps the token for this tab; "" forgets it. */
export function keepToken(value) {
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // without storage every question is asked without it, and the server says so
  }
}

/** GET of a path below the page's own; the Response. Throws ServerError, or fetch's own error when nobody answers. */
export async function get(path) {
  const given = token();
  const headers = given ? { authorization: `Bearer ${given}` } : {};
  const reply = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (reply.ok) return reply;
  const error = await errorOf(reply);
  if (error.isLocked) door.dispatchEvent(new CustomEvent("locked", { detail: error.message }));
  throw error;
}

export const getJson = async (path) => (await get(path)).json();
