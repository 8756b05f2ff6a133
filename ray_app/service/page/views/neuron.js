// One neuron: what it did in each task, where it was selected, its experts, what excites it most.

import * as api from "../api.js";
import {h, labelled, put, select} from "../shared/dom.js";
import {distinct, show} from "../shared/format.js";
import {barCell} from "../progress.js";
import {go, hrefOf, readRoute, rename} from "../routes.js";
import {newest, nothing, settle} from "../states.js";
import {recordTable} from "../shared/table.js";
import {examplesOf} from "./examples.js";

export async function openNeuron({body, signal}, route) {
  const {runs} = await api.get(api.path("runs"), {}, signal);
  if (!runs.length) {
    return void put(body, nothing("This store has no run yet. `actlake capture` makes one."));
  }
  const box = h("div");
  const told = h("p", {class: "unseen", role: "status"});
  const controls = h("form", {class: "controls", "aria-label": "Which neuron",
    onsubmit: (event) => event.preventDefault()});
  const next = newest(signal);
  let run = null; // The description of the run that is shown.

  // Fills what the address leaves open.
  async function complete({parts: [wanted, site, layer, neuron], query}) {
    const id = wanted || runs[0].run;
    if (run?.run !== id) run = await api.get(api.path("runs", id), {}, signal);
    const first = run.sites.find((one) => (site ? one.site === site : one.site === "mlp"))
      ?? run.sites[0];
    return {run: id, site: site || first.site, layer: layer || String(first.layer),
            neuron: neuron || "0", task: query.get("task"), per_sample: query.get("per_sample")};
  }

  async function display(changed, focused = null) {
    const place = await complete(changed);
    rename(hrefTo(place));
    put(controls, chooser(runs, run, place));
    if (focused) controls.querySelector(`[name="${focused}"]`)?.focus();
    const running = next();
    told.textContent = "";
    await settle(box, "the neuron", async () => {
      const neuron = await api.get(
        api.path("runs", place.run, "neurons", place.site, place.layer, place.neuron),
        {task: place.task, per_sample: place.per_sample}, running);
      told.textContent = `${nameOf(neuron)} of layer ${neuron.layer} is shown.`;
      return contentOf(neuron, place, run);
    });
    if (focused && !running.aborted) box.querySelector(`[name="${focused}"]`)?.focus();
  }

  put(body, controls, told, box);
  await display(route);
  return (changed) => display(changed, document.activeElement?.name);
}

// Goes on from the address, which may be ahead of what is shown.
function to(changes) {
  const {parts: [run, site, layer, neuron], query} = readRoute();
  go(hrefTo({run, site, layer, neuron, ...Object.fromEntries(query), ...changes}));
}

// What is null is left open, and all that comes after it in the path.
function hrefTo({run, site, layer, neuron, task, per_sample}) {
  const parts = [run, site, layer, neuron];
  const open = parts.findIndex((part) => !part);
  return hrefOf("neuron", open < 0 ? parts : parts.slice(0, open), {task, per_sample});
}

// ---- which neuron ----

function chooser(runs, run, place) {
  const sites = distinct(run.sites.map(({site}) => site));
  const layers = run.sites.filter(({site}) => site === place.site).map(({layer}) => layer);
  const width = run.sites.find(({site, layer}) =>
    site === place.site && String(layer) === place.layer)?.width ?? 1;
  const named = (name, control) => {
    control.setAttribute("name", name);
    return control;
  };
  const list = (name, choices, onchoose) => named(name, select(choices, place[name], (event) =>
    to(onchoose(event.target.value))));
  const index = named("neuron", h("input", {type: "number", min: 0, max: width - 1, step: 1,
    value: place.neuron, required: true, onchange: () => index.reportValidity()
      && to({neuron: index.value})}));
  const step = (name, text, by) => {
    const other = Number(place.neuron) + by;
    return h("button", {type: "button", class: "plain", name, disabled: other < 0 || other >= width,
                        "aria-label": `${text} neuron`, onclick: () => to({neuron: String(other)})},
      by < 0 ? "‹ Previous" : "Next ›");
  };
  return [
    labelled("Run", list("run", runs.map((one) => one.run), (value) => ({run: value,
      site: null, layer: null, neuron: null, task: null}))),
    labelled("Site", list("site", sites, (site) => ({site,
      layer: String(run.sites.find((one) => one.site === site).layer), neuron: "0"}))),
    labelled("Layer", list("layer", layers, (layer) => ({layer, neuron: clamp(place.neuron,
      run.sites.find((one) => one.site === place.site && String(one.layer) === layer).width)}))),
    labelled(`Neuron (0 to ${show(width - 1)})`, index),
    h("span", {class: "steps"}, step("previous", "Previous", -1), step("next", "Next", 1)),
  ];
}

const clamp = (neuron, width) => String(Math.min(Number(neuron), width - 1));

// ---- what is known of it ----

const nameOf = ({site, neuron}) => `${site} neuron ${neuron}`;

function contentOf(neuron, place, run) {
  const head = neuron.head === null ? "" : `, head ${neuron.head}`;
  return [
    h("h2", {}, `${nameOf(neuron)} of ${show(neuron.width)} in layer ${neuron.layer}${head}`),
    h("div", {class: "pair"}, statisticsOf(neuron),
      h("div", {}, scoresOf(neuron), expertsOf(neuron))),
    examplesOf(neuron, {
      tasks: run.tasks.map(({task}) => task), task: place.task, perSample: place.per_sample === "true",
      choose: to,
    }),
  ];
}

const part = (title, ...children) => h("section", {"aria-label": title}, h("h3", {}, title), children);

const NUMBERS = ["n", "mean", "std", "abs", "freq", "min", "max"];
const LABELS = {abs: "mean |z|", freq: "z > 0"};

function statisticsOf({statistics}) {
  const title = "Statistics by task";
  if (!statistics.length) return part(title, nothing("No shard of this run is committed yet."));
  const most = Math.max(...statistics.map((row) => row.abs));
  return part(title, recordTable(title, [
    {name: "task"},
    ...NUMBERS.map((name) => ({
      name, label: LABELS[name] ?? name, numeric: true, percent: name === "freq",
      cell: name === "abs" ? (value) => barCell(value, most) : null,
    })),
  ], statistics));
}

function scoresOf({scores, run}) {
  const title = "Scores and selections";
  if (!scores) {
    return part(title, nothing("No analysis has scored this neuron: make one with "
      + `\`actlake analyse STORE --run ${run}\`.`));
  }
  return part(title,
    h("p", {class: "hint"}, `By ${scores.metric} against ${scores.reference}, of analysis `,
      h("a", {href: hrefOf("overlap", [scores.analysis], {metric: scores.metric})}, scores.analysis)),
    recordTable(title, [
      {name: "task"}, {name: "importance", numeric: true}, {name: "score", numeric: true},
      {name: "rank", numeric: true}, {name: "population", label: "of", numeric: true},
      {name: "fractions", label: "in the top", cell: (fractions) =>
        (fractions?.length ? fractions.map((fraction) => show(fraction, true)).join(", ") : "–")},
    ], scores.rows));
}

function expertsOf({experts, run}) {
  const title = "Its experts";
  if (!experts?.length) {
    return part(title, nothing("No analysis groups the neurons of this layer: make one with "
      + `\`actlake experts STORE --run ${run}\`.`));
  }
  return part(title, recordTable(title, [
    {name: "analysis"}, {name: "method"}, {name: "expert", numeric: true},
    {name: "size", label: "neurons in it", numeric: true},
  ], experts));
}
