// A chart of an answer, of columns that the reader chooses.

import {barChart, colorRange, heatMap, legendOf, scaleOf, xyChart} from "../shared/charts.js";
import {h, labelled, put, select} from "../shared/dom.js";
import {distinct, isNumericType, show, showExact, toNumber} from "../shared/format.js";
import {cellSize, roomIn} from "../room.js";
import {nothing} from "../states.js";

const MOST_BARS = 60, MOST_SERIES = 24, MOST_POINTS = 5000, MOST_CELLS = 80;
const NONE = "(none)";

// {columns, rows} -> controls and the chart.
export function pictureOf(made) {
  const names = made.columns.map(({name}) => name);
  const numbers = made.columns.filter(({type}) => isNumericType(type)).map(({name}) => name);
  if (!numbers.length) return nothing("A chart needs a column of numbers.");
  if (!made.rows.length) return nothing("There is no row to draw.");
  const chosen = firstChoice(names, numbers);
  const controls = h("div", {class: "controls"});
  const figure = h("div", {class: "chart"});

  function control(name, key, choices) {
    if (!choices.includes(chosen[key])) chosen[key] = choices[0];
    const list = select(choices, chosen[key], () => {
      chosen[key] = list.value;
      if (key === "kind") {
        fill();
        controls.querySelector("select").focus();
      }
      draw();
    });
    return labelled(name, list);
  }

  function fill() {
    put(controls, control("Chart", "kind", ["bars", "line", "points", "heat map"]), {
      bars: () => [control("Bar for each", "x", names), control("and each", "series", [NONE, ...names]),
                   control("Length", "y", numbers)],
      line: () => [control("Across", "x", numbers), control("Up", "y", numbers),
                   control("Line for each", "series", [NONE, ...names])],
      points: () => [control("Across", "x", numbers), control("Up", "y", numbers),
                     control("Colour", "series", [NONE, ...names])],
      "heat map": () => [control("Down", "x", names), control("Across", "series", names),
                         control("Colour", "y", numbers)],
    }[chosen.kind]());
  }

  function draw() {
    const of = (name) => (row) => row[names.indexOf(name)];
    const drawn = {bars: bars, line: lines, points: lines, "heat map": map}[chosen.kind];
    put(figure, drawn({...chosen, of, rows: made.rows, room: roomIn(figure)}));
  }

  fill();
  requestAnimationFrame(draw); // The box has its width once it is on the page.
  return [controls, figure];
}

// Layers and positions make lines, names make bars. `x`, `y` and `series` are kept when the reader
// chooses another kind of chart.
function firstChoice(names, numbers) {
  const texts = names.filter((name) => !numbers.includes(name));
  const order = numbers.find((name) => ["layer", "from_layer", "position"].includes(name));
  const y = numbers.findLast((name) => name !== order) ?? numbers[0];
  if (order && y !== order) return {kind: "line", x: order, y, series: texts[0] ?? NONE};
  return {kind: "bars", x: texts[0] ?? names[0], y, series: texts[1] ?? NONE};
}

const told = (count, most, what) => (count > most
  ? h("p", {class: "notice"}, `The chart shows the first ${show(most)} of ${show(count)} ${what}.`)
  : null);

function bars({of, rows, x, y, series, room}) {
  const named = series === NONE ? [x] : [x, series];
  const labelOf = (row) => named.map((name) => showExact(of(name)(row))).join(" · ");
  const all = rows.map((row) => [labelOf(row), toNumber(of(y)(row))])
    .filter(([, value]) => value !== null);
  if (!all.length) return nothing("No row has a number to draw.");
  return [told(all.length, MOST_BARS, "rows"),
    barChart({name: `${y} of each ${named.join(" and ")}`, y, bars: all.slice(0, MOST_BARS), width: room})];
}

function lines({of, rows, kind, x, y, series, room}) {
  const nameOf = series === NONE ? () => y : (row) => showExact(of(series)(row));
  const points = rows.map((row) => ({name: nameOf(row), x: toNumber(of(x)(row)),
    y: toNumber(of(y)(row))})).filter((point) => point.x !== null && point.y !== null);
  if (!points.length) return nothing("No row has two numbers to draw.");
  const groups = Map.groupBy(points.slice(0, MOST_POINTS), (point) => point.name);
  const drawn = [...groups].slice(0, MOST_SERIES).map(([name, own]) => ({
    name,
    points: (kind === "line" ? own.toSorted((a, b) => a.x - b.x) : own).map((point) =>
      ({...point, text: `${name}\n${x}: ${show(point.x)}\n${y}: ${show(point.y)}`})),
  }));
  const title = `${y} by ${x}${series === NONE ? "" : `, one ${kind === "line" ? "line" : "colour"} `
    + `for each ${series}`}`;
  const chart = xyChart({name: title, kind: kind === "line" ? "line" : "scatter", x, y, series: drawn,
    width: room});
  return [told(points.length, MOST_POINTS, "rows"), told(groups.size, MOST_SERIES, "series"), chart,
    legendOf(drawn.map((one) => one.name), [chart])];
}

function map({of, rows, x, y, series, room}) {
  const all = rows.map((row) => ({down: showExact(of(x)(row)), across: showExact(of(series)(row)),
    value: toNumber(of(y)(row))}));
  const [down, across] = ["down", "across"].map((key) => distinct(all.map((cell) => cell[key])));
  const kept = [down, across].map((values) => values.slice(0, MOST_CELLS));
  const [isDown, isAcross] = kept.map((values) => new Set(values));
  const cells = all.filter((cell) => isDown.has(cell.down) && isAcross.has(cell.across));
  const range = colorRange(cells.map((cell) => cell.value));
  const twice = cells.length > new Set(cells.map((cell) => `${cell.down}\n${cell.across}`)).size;
  return [
    told(Math.max(down.length, across.length), MOST_CELLS, "names"),
    twice ? h("p", {class: "notice"}, "Several rows have the same place; the last is seen.") : null,
    scaleOf(...range.map((end) => show(end))),
    heatMap({name: `${y} by ${x} and ${series}`, down: kept[0], across: kept[1], range,
      size: cellSize(...kept, room),
      cells: cells.map((cell) => ({...cell, text: brief(cell.value),
        note: `${x}: ${cell.down}\n${series}: ${cell.across}\n${y}: ${show(cell.value)}`}))}),
  ];
}

const brief = (value) => (value === null ? "" : Math.abs(value) >= 10 ? value.toFixed(0)
  : String(Number(value.toPrecision(2))));
