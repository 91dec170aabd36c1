// The page: views and keys, the poll of the state, the door for operators.

import { door, getJson, keepToken } from "./api.js";
import { find, say, set } from "./dom.js";
import { Fleet, unready } from "./fleet.js";
import { lasting } from "./format.js";
import { History } from "./history.js";
import { Live } from "./live.js";
import { Playground } from "./playground.js";
import { Poll } from "./poll.js";
import { Requests } from "./requests.js";

const VIEWS = ["fleet", "live", "requests", "playground"];
const PERIOD_MS = 1000;
const STALE_S = 3;

const history = new History();
const fleet = new Fleet();
const live = new Live();
const requests = new Requests();
const playground = new Playground();
let view = "";
let heardAt = null; // performance.now() of the last answer
let trouble = ""; // why there was none since
let isLocked = false;
let missing = ""; // replicas that are not ready, in words

// --- state ----------------------------------------------------------------------------------------

const poll = new Poll(() => getJson("console/state"), PERIOD_MS, heard, failed);

function heard(state) {
  heardAt = performance.now();
  trouble = "";
  isLocked = false;
  history.add(state);
  say(find("version"), state.version);
  missing = unready(fleet.update(history));
  if (view === "live") live.update(history);
  showLink();
}

function failed(error) {
  trouble = error.isLocked ? error.message : error.status ? error.message : "The server does not answer.";
  showLink();
}

/** How fresh the page is: in the corner as a word, and as a banner when it is not. */
function showLink() {
  const age_s = heardAt === null ? null : (performance.now() - heardAt) / 1000;
  let word = "live";
  if (isLocked) word = "locked";
  else if (document.hidden) word = "paused";
  else if (age_s === null) word = trouble ? "gone" : "connecting";
  else if (trouble && age_s > STALE_S) word = "gone";
  else if (age_s > STALE_S) word = "stale";
  document.body.dataset.link = word;
  set(find("link"), "class", `pill ${word}`);
  say(find("link"), word);
  const alarm = word === "gone" ? "server gone" : missing;
  document.title = alarm ? `(!) ${alarm} · Argosy` : "Argosy console";
  const banner = find("banner");
  const shown = age_s === null ? "" : `What is shown is ${lasting(age_s)} old.`;
  banner.hidden = !["gone", "stale", "locked"].includes(word);
  find("unlock").hidden = !isLocked;
  if (banner.hidden) return;
  say(find("banner-text"), trouble || "No news from the server.");
  say(find("banner-age"), shown); // apart from the alert: it would be read out with every second
}

setInterval(showLink, 500);
document.addEventListener("visibilitychange", showLink);

// --- the door -------------------------------------------------------------------------------------

const login = find("login");

door.addEventListener("locked", ({ detail }) => {
  trouble = detail;
  poll.stop();
  requests.close();
  showLink();
  if (isLocked) return; // asked already, and told "not now"
  isLocked = true;
  showLink();
  askForToken();
});

function askForToken() {
  say(find("login-why"), trouble);
  find("token").value = "";
  if (!login.open) login.showModal();
}

login.addEventListener("close", () => {
  const given = find("token").value.trim();
  find("token").value = "";
  if (login.returnValue !== "ok" || !given) return;
  keepToken(given);
  isLocked = false;
  trouble = "";
  poll.start();
  route();
});
login.addEventListener("cancel", () => (login.returnValue = "cancel"));
find("unlock").addEventListener("click", askForToken);

// --- views ----------------------------------------------------------------------------------------

function route() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const next = VIEWS.includes(name) ? name : VIEWS[0];
  const isNew = next !== view;
  view = next;
  for (const other of VIEWS) find(`view-${other}`).hidden = other !== view;
  for (const link of find("views").children) set(link, "aria-current", link.hash === `#${view}` ? "page" : null);
  if (isNew) scrollTo(0, 0);
  if (view === "requests" && !isLocked) requests.open(decoded(rest.join("/")));
  else requests.close();
  if (view === "live" && history.latest) live.update(history);
  if (view === "playground") playground.open();
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

addEventListener("hashchange", route);

// --- keys -----------------------------------------------------------------------------------------

const isTyping = (node) => node.matches?.("input:not([type=radio], [type=checkbox]), textarea, select");

function escape(target) {
  if (playground.stop()) return;
  if (isTyping(target)) target.blur();
  else if (view === "requests" && location.hash !== "#requests") location.hash = "#requests";
}

function neighbour(step) {
  const links = [...find("views").children];
  const at = links.indexOf(document.activeElement);
  const link = links[(at + step + links.length) % links.length];
  link.focus();
  location.hash = link.hash;
}

addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || document.querySelector("dialog[open]")) return;
  const { key, target } = event;
  if (key === "Escape") escape(target);
  else if (isTyping(target)) return;
  else if (VIEWS[Number(key) - 1]) location.hash = `#${VIEWS[Number(key) - 1]}`;
  else if (key === "/") {
    location.hash = "#requests";
    route();
    requests.focusFilter();
  } else if (key === "?") find("help").showModal();
  else if (key === "t") find("theme").click();
  else if (find("views").contains(target) && (key === "ArrowRight" || key === "ArrowLeft")) neighbour(key === "ArrowRight" ? 1 : -1);
  else return;
  event.preventDefault();
});

find("help-open").addEventListener("click", () => find("help").showModal());
route();
poll.start();
