// Starts the page: the log-in first, then the view that the address names.

import {h, put} from "./shared/dom.js";
import {readRoute, rename} from "./routes.js";
import * as session from "./session.js";
import {nothing, problem} from "./states.js";
import {openJobs} from "./views/jobs.js";
import {openLogin} from "./views/login.js";
import {openNeuron} from "./views/neuron.js";
import {openOverlap} from "./views/overlap.js";
import {openRuns} from "./views/runs.js";
import {openSql} from "./views/sql.js";

// Each view has a title and a function that fills the page. It may give back a function that takes
// another address of the same view, so that controls keep the focus.
const VIEWS = {
  sql: ["SQL console", openSql],
  neuron: ["Neurons", openNeuron],
  overlap: ["Overlap and layers", openOverlap],
  runs: ["Runs", openRuns],
  jobs: ["Jobs", openJobs],
};

const content = document.getElementById("content");
const nav = document.getElementById("nav");
const logout = document.getElementById("logout");

let shown = {name: null, update: null, controller: new AbortController()};

async function show() {
  const route = readRoute();
  if (!session.token()) return logIn("");
  if (shown.name === route.name && shown.update) return shown.update(route);
  const [title, open] = VIEWS[route.name] ?? ["No such page", openNothing];
  const body = start(route.name, title);
  const mine = shown;
  try {
    mine.update = await open({body, signal: mine.controller.signal}, route);
  } catch (error) {
    if (error.name === "AbortError" || mine.controller.signal.aborted) return;
    put(body, problem(error));
    if (!error.kind) throw error;
  }
}

// Ends the view before, and makes the heading and the empty body of the next.
function start(name, title) {
  shown.controller.abort();
  shown = {name, update: null, controller: new AbortController()};
  document.title = `${title} · actlake`;
  for (const link of nav.children) {
    if (link.getAttribute("href") === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  nav.hidden = logout.hidden = !session.token();
  const heading = h("h1", {tabindex: -1}, title);
  const body = h("div", {class: `view view-${name}`});
  put(content, heading, body);
  // A reader is told where it is; at the first view the page's own title does that.
  heading.focus({preventScroll: true});
  window.scrollTo(0, 0);
  return body;
}

function logIn(reason) {
  openLogin(start("login", "Log in"), reason, show);
}

function openNothing({body}) {
  put(body, nothing("This address names no page. Choose one above."));
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // The address belongs to the views.
  content.querySelector("h1").focus();
});
logout.addEventListener("click", () => session.end());
window.addEventListener("actlake-logged-out", (event) => logIn(event.detail));
window.addEventListener("hashchange", () => {
  session.takeFromAddress();
  show();
});

session.takeFromAddress();
if (!location.hash) rename("#/sql");
show();
