// Draws the figures of a report from the JSON block of the page.
//
// A section has a title and one of
//   missing   a sentence: what is not there, and the command that makes it
//   choices   [{name, notes, figures}], of which the reader sees one; `name` tells them apart
//
// A figure is an object with these keys:
//   kind      "facts", "table", "heat" or "lines"
//   query     index of the query whose rows it shows
//   controls  [{column, name}]: the reader chooses one value of each column
//   present, absent   columns that must, or must not, have a value
//   panels    columns: one panel for each combination of their values
//   prefix    {column: what stands before its values in titles and legends}
//   percent   columns: shares to be shown as percent
//   table:    columns that are shown, all if not given
//   heat:     row, column, value; mark: {column, most} frames cells up to that value
//   lines:    x, series (columns), values [{column, name, and lower, upper or spread}], or picks, such
//             values of which the reader chooses one; zero: the axis holds 0; free: each panel has its
//             own axis
// What comes from the store becomes text nodes and attributes, never markup.

import {colorRange, heatMap, heightsOf, legendOf, scaleOf, xyChart} from "./shared/charts.js";
import {h, labelled, put, select, sentence, slider} from "./shared/dom.js";
import {distinct, isNumber, show, words} from "./shared/format.js";
import {recordTable} from "./shared/table.js";

const report = JSON.parse(document.getElementById("report").textContent);

// ---- values ----

const labels = new Map(Object.entries(report.labels));
const labelOf = (value) => labels.get(value) ?? show(value);
const isPercent = (figure, column) => (figure.percent ?? []).includes(column);

function rowsOf({columns, data}) {
  // Text is kept once for all rows that have it.
  const whole = data.map((column) => column.codes
    ? column.codes.map((code) => code === null ? null : column.values[code]) : column);
  return whole[0].map((_, index) =>
    Object.fromEntries(columns.map((column, place) => [column, whole[place][index]])));
}

// Rows in groups by the values of some columns, in order of appearance.
const grouped = (rows, columns) => [...Map.groupBy(rows, (row) =>
  JSON.stringify(columns.map((column) => row[column]))).values()];

const nameOf = (figure, row, columns) => columns
  .map((column) => (figure.prefix?.[column] ?? "") + labelOf(row[column])).join(" · ");

const describe = (figure, row) => Object.entries(row)
  .map(([column, value]) => `${words(column)}: ${show(value, isPercent(figure, column))}`).join("\n");

function csv(columns, rows) {
  const cell = (value) => {
    const text = value === null ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows.map((row) => columns.map((column) => row[column]))]
    .map((line) => line.map(cell).join(",") + "\r\n").join("");
}

// ---- kinds of figures: rows to elements ----

const draw = {};

function rowTable(figure, rows, columns, name) {
  const isText = (column) => rows.every((row) => !isNumber(row[column]));
  return recordTable(name, columns.map((column) => (isText(column) ? {name: column, cell: labelOf}
    : {name: column, numeric: true, percent: isPercent(figure, column)})), rows, {sortable: true});
}

draw.facts = (figure, rows) => rows.map((row) => h("div", {class: "panel"},
  h("h5", {}, labelOf(row[figure.name])),
  h("dl", {}, Object.entries(row).filter(([column]) => column !== figure.name)
    .map(([column, value]) => [h("dt", {}, words(column)), h("dd", {}, show(value))]))));

draw.table = (figure, rows) => panelsOf(figure, rows, (own, name) =>
  rowTable(figure, own, figure.columns ?? Object.keys(own[0]), name));

// One panel for each combination of the panel columns, those that share the first side by side;
// `make(rows, accessible name)` fills it.
function panelsOf(figure, rows, make) {
  const columns = figure.panels ?? [];
  const panelOf = (own) => {
    const title = nameOf(figure, own[0], columns);
    const name = title ? `${figure.title}, ${title}` : figure.title;
    return h("div", {class: "panel"}, title ? h("h5", {}, title) : null, make(own, name));
  };
  const panels = grouped(rows, columns).map((own) => [own[0][columns[0]], panelOf(own)]);
  const firsts = distinct(panels.map(([first]) => first));
  if (firsts.length < 2 || firsts.length === panels.length) return panels.map(([, panel]) => panel);
  return firsts.map((first) => h("div", {class: "panels side"},
    panels.filter(([own]) => own === first).map(([, panel]) => panel)));
}

function cellText(figure, value) {
  if (!isNumber(value)) return "";
  if (isPercent(figure, figure.value)) return (100 * value).toFixed(0);
  return value >= 10 ? value.toFixed(0) : value.toFixed(1);
}

draw.heat = (figure, rows) => {
  const range = colorRange(rows.map((row) => row[figure.value]));
  return [
    scaleOf(...range.map((end) => show(end, isPercent(figure, figure.value)))),
    panelsOf(figure, rows, (own, name) => {
      const cells = own.map((row) => ({
        down: labelOf(row[figure.row]), across: labelOf(row[figure.column]), value: row[figure.value],
        text: cellText(figure, row[figure.value]), note: describe(figure, row),
        isMarked: figure.mark && isNumber(row[figure.mark.column])
          && row[figure.mark.column] <= figure.mark.most,
      }));
      const down = distinct(cells.map((cell) => cell.down));
      const columns = distinct(cells.map((cell) => cell.across));
      // Tasks against tasks: in one order, whichever appears first.
      const across = distinct([...down.filter((value) => columns.includes(value)), ...columns]);
      const size = across.length > 30 ? 14 : across.length > 12 ? 24 : 30;
      const text = `${name}: ${words(figure.value)} by ${words(figure.row)} and `
        + `${words(figure.column)}, ${cells.length} cells. The rows are below the figure.`;
      return heatMap({name: text, down, across, cells, range, size});
    }),
  ];
};

function seriesOf(figure, rows) {
  return grouped(rows, figure.series ?? []).flatMap((own) => figure.values.map((value) => ({
    name: [nameOf(figure, own[0], figure.series ?? []), value.name].filter(Boolean).join(" · "),
    points: own.map((row) => {
      const y = row[value.column], spread = value.spread ? row[value.spread] : null;
      return {
        x: row[figure.x], y, text: describe(figure, row),
        lower: isNumber(spread) ? y - spread : row[value.lower],
        upper: isNumber(spread) ? y + spread : row[value.upper],
      };
    }).filter((point) => isNumber(point.x) && isNumber(point.y)).sort((a, b) => a.x - b.x),
  })));
}

draw.lines = (figure, rows) => {
  const all = seriesOf(figure, rows);
  const names = distinct(all.map((one) => one.name));
  const y = words(figure.values[0].column);
  const panels = panelsOf(figure, rows, (own, name) => {
    const series = seriesOf(figure, own).map((one) => ({...one, place: names.indexOf(one.name)}));
    return xyChart({
      name: `${name}: ${y} by ${words(figure.x)}, ${series.length} lines. The rows are below the figure.`,
      kind: "line", x: words(figure.x), y: figure.values.length > 1 ? "" : y, series, width: 340,
      percent: {x: isPercent(figure, figure.x), y: isPercent(figure, figure.values[0].column)},
      heights: heightsOf(figure.free ? series : all, figure.zero),
    });
  });
  return [legendOf(names, panels), panels];
};

// ---- figures ----

const ascending = (a, b) => (isNumber(a) && isNumber(b) ? a - b : 0);

// A slider for numbers, a list for names, a text for one value; `choose` gets a value now and at each
// change.
function control(name, values, choose) {
  choose(values[0]);
  if (values.length < 2) return h("p", {class: "field"}, h("span", {}, name), show(values[0]));
  return labelled(name, values.every(isNumber)
    ? slider(values, values[0], {text: (value) => show(value), oninput: choose})
    : select(values.map((value, place) => [place, show(value)]), 0, (event) =>
      choose(values[Number(event.target.value)])));
}

function figureOf(given, id) {
  let figure = given;
  const query = report.queries[figure.query];
  const all = rowsOf(query);
  const rows = all
    .filter((row) => (figure.present ?? []).every((column) => row[column] !== null))
    .filter((row) => (figure.absent ?? []).every((column) => row[column] === null));
  const chosen = {};
  const body = h("div", {class: "panels"});
  const csvLink = h("a", {href: "#", download: `${query.name}.csv`, onclick: save},
    "Download these rows as CSV");
  const drawnRows = h("p", {class: "hint"});
  const rowsBox = h("div", {class: "rows"});
  const details = h("details", {ontoggle: fillRows}, h("summary", {}, "Rows"), rowsBox);
  let plotted = rows, isReady = false;

  function save() {
    const text = csv(query.columns, plotted);
    csvLink.href = URL.createObjectURL(new Blob([text], {type: "text/csv;charset=utf-8"}));
    setTimeout(() => URL.revokeObjectURL(csvLink.href), 60000);
  }

  function fillRows() {
    put(rowsBox, details.open ? rowTable({}, plotted, query.columns, `Rows of ${figure.title}`) : null);
  }

  function redraw() {
    if (!isReady) return;
    plotted = rows.filter((row) =>
      Object.entries(chosen).every(([column, value]) => row[column] === value));
    put(body, draw[figure.kind](figure, plotted));
    const conditions = [
      ...Object.entries(chosen).map(([column, value]) => `${column} = ${value}`),
      ...(figure.present ?? []).map((column) => `${column} is not null`),
      ...(figure.absent ?? []).map((column) => `${column} is null`),
    ];
    drawnRows.textContent = plotted.length === all.length
      ? `All its ${show(plotted.length)} rows are shown.`
      : `Of its ${show(all.length)} rows, the ${show(plotted.length)} with `
        + `${conditions.join(" and ")} are shown.`;
    fillRows();
  }

  const controls = (figure.controls ?? []).map(({column, name}) =>
    control(name ?? words(column), distinct(rows.map((row) => row[column])).sort(ascending), (value) => {
      chosen[column] = value;
      redraw();
    }));
  if (figure.picks) {
    controls.push(control("shown", figure.picks.map((pick) => pick.name), (name) => {
      const pick = figure.picks.find((one) => one.name === name);
      figure = {...figure, values: [{...pick, name: null}]};
      redraw();
    }));
  }
  isReady = true;
  redraw();
  return h("figure", {id, "aria-labelledby": `${id}-title`},
    h("figcaption", {}, h("h4", {id: `${id}-title`}, figure.title),
      figure.text ? h("p", {}, figure.text) : null),
    controls.length ? h("div", {class: "bar"}, controls) : null,
    body,
    h("div", {class: "tools"}, csvLink, details,
      h("details", {}, h("summary", {}, "SQL"), h("pre", {tabindex: 0}, query.sql), drawnRows)));
}

// ---- the page ----

function sectionOf({title, missing, choices = []}, id) {
  const body = h("div");
  const choose = (place) => put(body,
    choices[place].notes.map((note) => h("p", {class: "hint"}, sentence(note))),
    choices[place].figures.map((figure, index) => figureOf(figure, `${id}-${place}-${index}`)));
  if (choices.length) choose(0);
  return h("section", {"aria-labelledby": `${id}-title`, id},
    h("h3", {id: `${id}-title`}, title),
    missing ? h("p", {}, sentence(missing)) : null,
    choices.length > 1 ? h("div", {class: "bar"}, labelled("Analysis",
      select(choices.map(({name}, place) => [place, name]), 0, (event) =>
        choose(Number(event.target.value))))) : null,
    body);
}

document.getElementById("place").textContent = `Store ${report.store}`;
put(document.getElementById("contents"), h("ul", {}, report.parts.map((part, place) =>
  h("li", {}, part.title, h("ul", {}, part.sections.map((section, index) =>
    h("li", {}, h("a", {href: `#part-${place}-${index}`}, section.title))))))));
put(document.getElementById("content"), report.parts.map((part, place) => h("section", {},
  h("h2", {}, part.title),
  part.sections.map((section, index) => sectionOf(section, `part-${place}-${index}`)))));
