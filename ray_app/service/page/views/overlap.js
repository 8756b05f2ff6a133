// The explorer of one analysis: which tasks share neurons, and in which layers they lie.

import * as api from "../api.js";
import {colorRange, heatMap, heightsOf, legendOf, scaleOf, xyChart} from "../shared/charts.js";
import {h, labelled, put, select, slider} from "../shared/dom.js";
import {isNumber, show} from "../shared/format.js";
import {cellSize, roomIn} from "../room.js";
import {go, hrefOf, readRoute, rename} from "../routes.js";
import {newest, nothing, settle} from "../states.js";
import {recordTable, tableOf} from "../shared/table.js";

export async function openOverlap({body, signal}, route) {
  const found = await api.get(api.path("analyses"), {}, signal);
  const analyses = found.analyses.filter(({kind}) => kind === "overlap");
  if (!analyses.length) {
    return void put(body, nothing("No run of this store is analysed yet: `actlake analyse STORE` "
      + "finds which neurons its tasks select, and which they share."));
  }
  const controls = h("form", {class: "controls", "aria-label": "What is compared",
    onsubmit: (event) => event.preventDefault()});
  const box = h("div");
  const told = h("p", {class: "unseen", role: "status"});
  const next = newest(signal);

  async function display(changed, focused = null) {
    const analysis = changed.parts[0] || analyses[0].analysis;
    const [metric, fraction, site] = ["metric", "fraction", "site"].map((name) =>
      changed.query.get(name));
    const running = next();
    await settle(box, "the overlap", async () => {
      const ask = (kind, params) =>
        api.get(api.path("analyses", analysis, kind), params, running);
      const overlap = await ask("overlap", {metric, fraction, site});
      const exact = {metric: overlap.metric, fraction: overlap.fraction, site: overlap.site};
      const layers = await ask("layers", exact);
      const place = {analysis, ...exact, value: changed.query.get("value") ?? "share_of_a"};
      rename(hrefTo(place));
      put(controls, chooser(analyses, overlap, place));
      if (focused) controls.querySelector(`[name="${focused}"]`)?.focus();
      told.textContent = `The overlap of ${overlap.tasks.length} tasks is shown.`;
      const [left, right] = [h("div"), h("div")];
      const pair = h("div", {class: "pair wide"}, left, right);
      box.replaceChildren(pair); // Figures are as wide as their place on the page.
      const rooms = [roomIn(left), roomIn(right)];
      put(left, overlapOf(overlap, place.value, rooms[0]));
      put(right, layersOf(layers, place, rooms[1]));
      return pair;
    });
  }

  put(body, controls, told, box);
  await display(route);
  return (changed) => display(changed, document.activeElement?.name);
}

const placeOf = ({parts: [analysis], query}) => ({analysis, ...Object.fromEntries(query)});
const hrefTo = ({analysis, ...query}) => hrefOf("overlap", [analysis], query);

function chooser(analyses, {metrics, fractions, sites}, place) {
  // The address may be ahead of what is shown.
  const to = (changes) => go(hrefTo({...placeOf(readRoute()), ...changes}));
  const list = (name, choices, change = (value) => ({[name]: value})) => {
    const made = select(choices, place[name], (event) => to(change(event.target.value)));
    made.setAttribute("name", name);
    return made;
  };
  const texts = analyses.map(({analysis, run, created}) =>
    [analysis, [analysis, run, String(created).slice(0, 10)].filter(Boolean).join(" · ")]);
  return [
    labelled("Analysis", list("analysis", texts, (analysis) =>
      ({analysis, metric: null, fraction: null, site: null}))),
    labelled("Site", list("site", sites)),
    labelled("Importance", list("metric", metrics)),
    labelled("Shown", list("value", Object.entries(VALUES).map(([name, {title}]) => [name, title]))),
    fractions.length > 1 ? labelled("Selected", slider(fractions, place.fraction, {name: "fraction",
      text: topOf, onchange: (fraction) => to({fraction})}))
      : h("p", {class: "field"}, h("span", {}, "Selected"), topOf(fractions[0])),
  ];
}

const topOf = (fraction) => `top ${show(fraction, true)}`;

// What a cell can hold: columns of the view overlap.
const VALUES = {
  share_of_a: {
    title: "share of the row's neurons", percent: true, brief: (value) => (100 * value).toFixed(0),
    told: (chance) => "Of the neurons that the task of the row selects, the share that the task of "
      + `the column selects as well. By chance it would be ${show(chance, true)}.`,
  },
  lift: {
    title: "times chance", percent: false,
    brief: (value) => (value >= 10 ? value.toFixed(0) : value.toFixed(1)),
    told: () => "How many times as many neurons two tasks share as two random selections of that "
      + "size would. 1 is chance.",
  },
};

function overlapOf({tasks, rows, site, metric, fraction, by_chance}, value, room) {
  const title = "Neurons that two tasks share";
  if (tasks.length < 2) {
    return h("section", {}, h("h2", {}, title), nothing("This analysis has one task: overlap needs two."));
  }
  const {percent, brief, told} = VALUES[value] ?? VALUES.share_of_a;
  const found = new Map(rows.map((row) => [JSON.stringify([row.task_a, row.task_b]), row]));
  const at = (down, across) => found.get(JSON.stringify([down, across]))?.[value] ?? null;
  const cells = tasks.flatMap((down) => tasks.map((across) => {
    const shown = at(down, across);
    return {down, across, value: shown, text: isNumber(shown) ? brief(shown) : "",
            note: noteOf(down, across, found.get(JSON.stringify([down, across])))};
  }));
  const range = colorRange(cells.map((cell) => cell.value));
  const name = `${title}: ${site} neurons, ${metric}, the top ${show(fraction, true)} of each task`;
  const columns = [{name: "task"}, ...tasks.map((task) =>
    ({name: task, label: task, numeric: true, percent}))];
  return h("section", {"aria-label": title}, h("h2", {}, title),
    h("p", {class: "hint"}, told(by_chance)),
    h("div", {class: "chart"}, scaleOf(...range.map((end) => show(end, percent))),
      heatMap({name, down: tasks, across: tasks, cells, range, size: cellSize(tasks, tasks, room)})),
    h("details", {}, h("summary", {}, "The same as a table"),
      tableOf(name, columns, tasks.map((task) =>
        [task, ...tasks.map((other) => at(task, other))]), {sortable: true})));
}

const noteOf = (down, across, row) => (row ? `${down} and ${across}\nshare: `
  + `${show(row.share_of_a, true)}\ntimes chance: ${show(row.lift)}\np: ${show(row.p_value)}`
  : `${down} itself`);

function layersOf({rows}, {site}, room) {
  const title = "Layers in which they lie";
  const series = [...Map.groupBy(rows, ({task}) => task)].map(([task, own]) => ({
    name: task,
    points: own.map((row) => ({x: row.layer, y: row.share, text: `${task}, layer ${row.layer}: `
      + `${show(row.share, true)} (${show(row.num_selected)} neurons)`})),
  }));
  if (!series.length) return h("section", {}, h("h2", {}, title), nothing("No neuron is selected."));
  const name = `${title}: share of each task's selected ${site} neurons, by layer`;
  const chart = xyChart({name, kind: "line", x: "layer", y: "share of the selection", series,
    percent: {y: true}, heights: heightsOf(series, true), width: room});
  return h("section", {"aria-label": title}, h("h2", {}, title),
    h("p", {class: "hint"}, `Of the ${site} neurons that each task selects, the share in each layer.`),
    h("div", {class: "chart"}, chart, legendOf(series.map((one) => one.name), [chart])),
    h("details", {}, h("summary", {}, "The same as a table"),
      recordTable(name, [{name: "task"}, {name: "layer", numeric: true},
        {name: "num_selected", label: "selected neurons", numeric: true},
        {name: "share", numeric: true, percent: true}], rows, {sortable: true})));
}
