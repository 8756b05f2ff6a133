// Tables: numbers to the right, sorted by a press on a column, a part of the rows at a time.

import {h, put, scrollBox} from "./dom.js";
import {show, words} from "./format.js";

const PAGE = 200;

// A table in a box that scrolls.
//
// name: what a screen reader calls it.
// columns: [{name, numeric, percent, label, note, cell}]; `cell(value, row)` gives what stands in a
//   cell instead of the value as text, `note` stands below the name.
// rows: lists of values, in the order of the columns.
// Sorted rows stay those of `rows`; values that are null come last.
export function tableOf(name, columns, rows, {sortable = false} = {}) {
  const body = h("tbody");
  const more = h("button", {type: "button", class: "plain more", onclick: () => fill(PAGE)});
  const heads = columns.map((column, place) => headOf(column, sortable ? () => sort(place) : null));
  let ordered = rows, shown = 0, sorted = {place: null, isDown: false};

  function fill(count) {
    const next = ordered.slice(shown, shown + count);
    body.append(...next.map((row) => h("tr", {}, columns.map((column, place) =>
      cellOf(column, row[place], row, place === 0)))));
    shown += next.length;
    const left = ordered.length - shown;
    more.hidden = left === 0;
    more.textContent = `Show ${show(Math.min(PAGE, left))} more of ${show(left)} rows`;
  }

  function sort(place) {
    const isDown = sorted.place === place ? !sorted.isDown : false;
    sorted = {place, isDown};
    const compare = columns[place].numeric ? byNumber : byText;
    const given = (row) => row[place] !== null;
    const known = rows.filter(given).sort((a, b) => compare(a[place], b[place]));
    ordered = [...(isDown ? known.reverse() : known), ...rows.filter((row) => !given(row))];
    heads.forEach((head, other) => {
      if (other === place) head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    put(body);
    const count = shown;
    shown = 0;
    fill(count);
  }

  fill(PAGE);
  return [
    scrollBox(name, h("table", {}, h("thead", {}, h("tr", {}, heads)), body)),
    rows.length > PAGE ? more : null,
  ];
}

function headOf(column, onsort) {
  const text = column.label ?? words(column.name);
  return h("th", {scope: "col", class: column.numeric ? "number" : null},
    onsort ? h("button", {type: "button", class: "sort", onclick: onsort}, text) : text,
    column.note ? h("small", {}, column.note) : null);
}

function cellOf(column, value, row, isFirst) {
  const made = column.cell ? column.cell(value, row) : show(value, column.percent);
  const isLong = typeof made === "string" && made.length > 40;
  const style = column.numeric ? "number" : isLong ? "long" : null;
  return h(isFirst ? "th" : "td", {scope: isFirst ? "row" : null, class: style}, made);
}

// Numbers that JSON could not hold come as text: "NaN", or whole ones too large for a double.
function byNumber(a, b) {
  if (isWhole(a) && isWhole(b)) {
    const [first, second] = [BigInt(a), BigInt(b)];
    return first < second ? -1 : first > second ? 1 : 0;
  }
  const [first, second] = [a, b].map(Number);
  if (Number.isNaN(first) || Number.isNaN(second)) {
    return Number.isNaN(first) - Number.isNaN(second);
  }
  return first - second;
}
const isWhole = (value) => /^-?\d+$/.test(String(value));

function byText(a, b) {
  const [first, second] = [a, b].map((value) => (typeof value === "string" ? value : show(value)));
  return first < second ? -1 : first > second ? 1 : 0;
}

// A table of rows that are objects.
export function recordTable(name, columns, records, options = {}) {
  const cells = columns.map((column) => (column.cell
    ? {...column, cell: (value, row) => column.cell(value, row.record)} : column));
  const rows = records.map((record) =>
    Object.assign(columns.map((column) => record[column.name] ?? null), {record}));
  return tableOf(name, cells, rows, options);
}
