// The runs of the store and how far they are, and one run with its tasks.

import * as api from "../api.js";
import {h, put} from "../shared/dom.js";
import {distinct, isUnset, show, showTime, words} from "../shared/format.js";
import {hrefOf} from "../routes.js";
import {newest, nothing, problem, repeat} from "../states.js";
import {progressOf} from "../progress.js";
import {recordTable} from "../shared/table.js";

const SECONDS = 5;

export async function openRuns({body, signal}, route) {
  const next = newest(signal);
  const display = (changed) => {
    const [run] = changed.parts;
    watch(body, next(), run ? (running) => oneRun(run, running) : allRuns);
  };
  display(route);
  return display;
}

// Shows what `ask` gives, and shows it again when it has changed.
async function watch(body, signal, ask) {
  let last = null;
  put(body, h("p", {class: "state"}, "Loading …"));
  await repeat(1000 * SECONDS, signal, async () => {
    try {
      const [answer, draw] = await ask(signal);
      const text = JSON.stringify(answer);
      if (signal.aborted || text === last) return;
      last = text;
      put(body, draw());
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      last = null;
      put(body, problem(error));
      if (!error.kind) throw error;
    }
  });
}

async function allRuns(signal) {
  const answer = await api.get(api.path("runs"), {}, signal);
  return [answer, () => (answer.runs.length ? runTable(answer.runs)
    : nothing("This store has no run yet: `actlake capture STUDY --store STORE` makes one, or a job "
      + "of this server."))];
}

const runTable = (runs) => recordTable("Runs of the store", [
  {name: "run", cell: (run) => h("a", {href: hrefOf("runs", [run])}, run)},
  {name: "num_committed", label: "shards committed", cell: (done, {num_shards}) =>
    progressOf(done, num_shards)},
  {name: "num_tokens", label: "tokens", numeric: true},
  {name: "model"}, {name: "init"}, {name: "dtype"},
  {name: "num_layers", label: "layers", numeric: true},
  {name: "num_neurons", label: "neurons", numeric: true},
  {name: "created", cell: showTime},
], runs, {sortable: true});

async function oneRun(id, signal) {
  const run = await api.get(api.path("runs", id), {}, signal);
  return [run, () => runOf(id, run)];
}

function runOf(id, run) {
  const sum = (name) => run.tasks.reduce((total, task) => total + task[name], 0);
  return [
    h("p", {}, h("a", {href: "#/runs"}, "‹ All runs")),
    h("h2", {}, id),
    h("p", {}, "Committed: ", progressOf(sum("num_committed"), sum("num_shards"), "shards")),
    h("p", {class: "links"}, h("a", {href: hrefOf("neuron", [id])}, "Its neurons"), " · ",
      h("a", {href: hrefOf("sql", [], {q: `select * from tasks\nwhere run = '${
        id.replaceAll("'", "''")}'`})}, "Its tasks in SQL")),
    h("div", {class: "pair"}, section("Tasks", recordTable("Tasks", [
      {name: "task"},
      {name: "num_committed", label: "shards committed", cell: (done, {num_shards}) =>
        progressOf(done, num_shards)},
      {name: "num_samples", label: "samples", numeric: true},
      {name: "num_tokens", label: "tokens", numeric: true},
    ], run.tasks)), section("Sites", recordTable("Sites", [
      {name: "site"}, {name: "layers"}, {name: "width", label: "neurons of a layer", numeric: true},
      {name: "head_dim", label: "neurons of a head", numeric: true},
    ], sitesOf(run)))),
    h("div", {class: "pair"}, section("Model", factsOf(run.model)),
      section("Capture", factsOf(run.capture))),
  ];
}

const section = (title, ...children) =>
  h("section", {"aria-label": title}, h("h3", {}, title), children);

// Layers of one width together.
function sitesOf({sites}) {
  const groups = Map.groupBy(sites, ({site, width, head_dim}) => JSON.stringify([site, width, head_dim]));
  return [...groups.values()].map((own) => {
    const layers = distinct(own.map(({layer}) => layer)).sort((a, b) => a - b);
    const isRow = layers.length > 2 && layers.at(-1) - layers[0] === layers.length - 1;
    return {...own[0], layers: isRow ? `${layers[0]} to ${layers.at(-1)}` : layers.join(", ")};
  });
}

const factsOf = (facts) => h("dl", {}, Object.entries(facts ?? {})
  .filter(([, value]) => !isUnset(value))
  .map(([name, value]) => [h("dt", {}, words(name)), h("dd", {}, show(value))]));
