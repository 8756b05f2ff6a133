// The activations of a neuron that were highest and lowest, each token marked in what is around it.

import {h, labelled, select} from "../shared/dom.js";
import {plural, show} from "../shared/format.js";
import {sizeBar} from "../progress.js";
import {nothing} from "../states.js";

const ALL = "";

// `neuron` is the answer of the server. `tasks` may be chosen from; `choose` gets {task, per_sample}.
export function examplesOf(neuron, {tasks, task, perSample, choose}) {
  const title = "What excites it most";
  const rows = neuron.examples;
  const controls = h("div", {class: "controls"},
    labelled("Examples of", named("task", select([[ALL, "all tasks"], ...tasks], task ?? ALL,
      (event) => choose({task: event.target.value || null})))),
    h("label", {class: "check"}, named("per_sample", h("input", {type: "checkbox", checked: perSample,
      onchange: (event) => choose({per_sample: event.target.checked ? "true" : null})})),
      h("span", {}, "Only the best of each sample")));
  if (!rows) {
    return h("section", {"aria-label": title}, h("h3", {}, title),
      nothing(`There are no examples: ${neuron.examples_missing}. Capture it again with `
        + "`--set capture.top=5 --new-run`."));
  }
  return h("section", {"aria-label": title}, h("h3", {}, title), controls,
    rows.length ? h("div", {class: "kinds"}, ["highest", "lowest"].map((kind) =>
      listOf(kind, rows.filter((row) => row.kind === kind), neuron.modality)))
      : nothing("No activation of this neuron was kept for that task."));
}

const named = (name, control) => {
  control.setAttribute("name", name);
  return control;
};

function listOf(kind, rows, modality) {
  const title = kind === "highest" ? "Highest activations" : "Lowest activations";
  const most = Math.max(...rows.map((row) => Math.abs(row.value)));
  const sources = new Set(rows.map((row) => row.source));
  return h("section", {class: "kind", "aria-label": title}, h("h4", {}, title),
    sources.size === 1 && rows.length > 1
      ? h("p", {class: "hint"}, `All ${rows.length} are of one document.`)
      : h("p", {class: "hint"}, `Of ${plural(sources.size, "document")}.`),
    h("ol", {class: "examples"}, rows.map((row) => h("li", {},
      h("div", {class: "place"},
        h("span", {class: "value"}, show(row.value)),
        sizeBar(row.value, most),
        h("span", {}, `${row.task}, sample ${row.sample}, position ${row.position}`),
        row.label === null ? null : h("span", {class: "tag"}, row.label),
        h("span", {class: "source", title: row.source}, row.source)),
      modality === "image" ? patchOf(row) : contextOf(row)))));
}

const contextOf = (row) => h("p", {class: "context"}, row.before ?? "",
  h("mark", {}, visible(row.token)), row.after ?? "");

// Of an image there is no text: the token says which patch it is.
function patchOf(row) {
  const patch = /^\[PATCH (\d+),(\d+)\]$/.exec(row.token ?? "");
  return h("p", {class: "context"}, patch ? ["patch in ", h("mark", {},
    `row ${patch[1]}, column ${patch[2]}`), " of the image (from 0, top left)"]
    : ["at ", h("mark", {}, visible(row.token)), ", a token that the model adds to the image"]);
}

// Characters without ink would leave nothing to mark.
const visible = (token) => (token ?? "").replaceAll("\n", "↵").replaceAll("\t", "⇥")
  .replaceAll("\r", "␍");
