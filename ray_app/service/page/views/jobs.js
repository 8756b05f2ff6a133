// Jobs of the server: what runs, one of them with its log, and a form that starts another.

import * as api from "../api.js";
import {h, labelled, put, select, sentence} from "../shared/dom.js";
import {showTime} from "../shared/format.js";
import {progressOf} from "../progress.js";
import {go, hrefOf} from "../routes.js";
import {newest, nothing, problem, repeat} from "../states.js";
import {recordTable} from "../shared/table.js";

const SECONDS = 2;
const HOW = "Jobs are switched off. To let this page start captures and analyses, start the server "
  + "with `actlake serve STORE --studies FOLDER`: it may then run the studies of that folder, and no "
  + "others.";

const ACTIONS = [["run", "run: capture, then analyse"], ["capture", "capture"], ["analyse", "analyse"]];
const COLOURS = /\x1b\[[0-9;]*m/g; // What programs write for terminals.
const isOver = ({state}) => !["pending", "running"].includes(state);

export async function openJobs({body, signal}, route) {
  const next = newest(signal);
  const display = (changed) => {
    const running = next();
    return changed.parts[0] ? oneJob(body, running, changed.parts[0]) : allJobs(body, running);
  };
  await display(route);
  return display;
}

const stateOf = (state) => h("span", {class: `tag ${state}`}, state);

const farOf = ({progress}) => (progress ? progressOf(progress.done, progress.total, progress.unit) : "–");

// ---- all jobs ----

async function allJobs(body, signal) {
  const {enabled, studies} = await api.get(api.path("studies"), {}, signal);
  if (!enabled) return void put(body, h("p", {class: "notice"}, sentence(HOW)));
  const {runs} = await api.get(api.path("runs"), {}, signal);
  const list = h("section", {"aria-label": "Jobs"});
  put(body, formOf(studies, runs.map(({run}) => run)), list);
  let last = null;
  keepAsking(list, signal, async () => {
    const {jobs} = await api.get(api.path("jobs"), {}, signal);
    if (JSON.stringify(jobs) === last) return;
    last = JSON.stringify(jobs);
    // A reader who is in the table stays at the same job.
    const at = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    put(list, h("h2", {}, "Started so far"), jobs.length ? jobTable(jobs) : nothing("No job was started yet."));
    if (at) list.querySelector(`a[href="${CSS.escape(at)}"]`)?.focus();
  });
}

// Calls `work` every few seconds until it gives true; what goes wrong stands before the box until it
// goes right.
function keepAsking(box, signal, work) {
  const told = h("div");
  box.before(told);
  return repeat(1000 * SECONDS, signal, async () => {
    try {
      const isDone = await work();
      put(told);
      return isDone;
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      put(told, problem(error));
      if (!error.kind) throw error;
    }
  });
}

const jobTable = (jobs) => recordTable("Jobs", [
  {name: "id", label: "job", cell: (id) => h("a", {href: hrefOf("jobs", [id])}, id)},
  {name: "state", cell: stateOf},
  {name: "action"}, {name: "study"},
  {name: "progress", cell: (_, job) => farOf(job)},
  {name: "created", cell: showTime}, {name: "ended", cell: showTime},
], jobs);

function formOf(studies, runs) {
  const title = "Start a job";
  if (!studies.length) {
    return h("p", {class: "notice"}, "Jobs are switched on, but the folder of studies is empty.");
  }
  const about = h("p", {class: "hint"}, sentence(studies[0].description));
  const study = select(studies.map(({name}) => name), studies[0].name, () =>
    put(about, sentence(studies.find(({name}) => name === study.value).description)));
  const action = select(ACTIONS, "run", fit);
  const run = select([["", "the only one"], ...runs], "");
  const tokens = h("input", {type: "number", min: 1, step: 1, placeholder: "as the study says"});
  const overrides = h("textarea", {rows: 2, spellcheck: "false", "aria-describedby": "overrides-hint",
    placeholder: "capture.top=10"});
  const told = h("div");
  const button = h("button", {type: "submit"}, "Start");
  const ofCapture = [labelled("Tokens of a task", tokens), labelled("Changes to the study", overrides),
    h("p", {class: "hint", id: "overrides-hint"}, "One on a line: a key, =, a value.")];
  const ofAnalysis = labelled("Run to analyse", run);

  // An analysis takes what was captured: what to capture cannot be said then.
  function fit() {
    const isAnalysis = action.value === "analyse";
    ofCapture.forEach((part) => { part.hidden = isAnalysis; });
    ofAnalysis.hidden = !isAnalysis;
  }

  const requestOf = () => ({action: action.value, study: study.value, ...(action.value === "analyse"
    ? {run: run.value || null}
    : {tokens: tokens.value === "" ? null : Number(tokens.value),
       overrides: overridesOf(overrides.value)})});

  async function start(event) {
    event.preventDefault();
    button.disabled = true;
    try {
      const {job} = await api.post(api.path("jobs"), requestOf());
      go(hrefOf("jobs", [job.id]));
    } catch (error) {
      put(told, problem(error));
    } finally {
      button.disabled = false;
    }
  }

  fit();
  return h("form", {class: "start", "aria-label": title, onsubmit: start}, h("h2", {}, title),
    h("div", {class: "controls"}, labelled("Study", study), labelled("Action", action),
      ofCapture[0], ofAnalysis),
    about, ofCapture.slice(1),
    h("div", {class: "bar"}, button), told);
}

// "capture.top=10" lines -> {"capture.top": "10"}.
function overridesOf(text) {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  return Object.fromEntries(lines.map((line) => {
    const [key, value] = line.split(/=(.*)/s);
    if (value === undefined) {
      throw new api.ApiError(0, "invalid", `A change must be a key, = and a value, found '${line}'.`);
    }
    return [key.trim(), value.trim()];
  }));
}

// ---- one job ----

async function oneJob(body, signal, id) {
  const top = h("div"), told = h("div");
  const log = h("pre", {class: "log", tabindex: 0, role: "log", "aria-label": "Log", "aria-live": "off"});
  const status = h("p", {class: "unseen", role: "status"});
  const cancel = h("button", {type: "button", class: "plain", onclick: stop}, "Cancel the job");
  let offset = 0, shown = null;

  async function stop() {
    cancel.disabled = true;
    try {
      draw((await api.remove(api.path("jobs", id), signal)).job);
    } catch (error) {
      put(told, problem(error));
      cancel.disabled = false;
    }
  }

  function draw(job) {
    if (job.state !== shown?.state) status.textContent = `Job state: ${job.state}.`;
    if (JSON.stringify(job) === JSON.stringify(shown)) return;
    shown = job;
    cancel.hidden = isOver(job);
    put(top, h("dl", {},
      facts("state", stateOf(job.state)), facts("progress", farOf(job)),
      facts("study", job.study), facts("action", job.action),
      facts("started", showTime(job.created)), facts("ended", showTime(job.ended)),
      job.message ? facts("message", job.message) : null));
  }

  put(body, h("p", {}, h("a", {href: "#/jobs"}, "‹ All jobs")), h("h2", {}, `Job ${id}`), top, status,
    h("div", {class: "bar"}, cancel), told, h("h3", {}, "Log"), log);
  draw((await api.get(api.path("jobs", id), {}, signal)).job);
  keepAsking(top, signal, async () => {
    const wasOver = isOver(shown);
    if (!wasOver) draw((await api.get(api.path("jobs", id), {}, signal)).job);
    const more = await api.get(api.path("jobs", id, "log"), {offset}, signal);
    offset = more.next_offset;
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    if (more.text) log.append(more.text.replaceAll(COLOURS, ""));
    if (atEnd) log.scrollTop = log.scrollHeight;
    // What was written after the last look is still to come.
    const isDone = wasOver && !more.text;
    if (isDone && log.textContent === "") log.textContent = "The job wrote nothing.";
    return isDone;
  });
}

const facts = (name, value) => [h("dt", {}, name), h("dd", {}, value)];
