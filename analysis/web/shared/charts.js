// Figures as SVG: bars, lines, points and heat maps. Each says in words what it shows; the numbers
// stand in a table beside it, and on each mark when it is pointed at.

import {h, newId, s, scrollBox} from "./dom.js";
import {isNumber, short, show} from "./format.js";

const COLORS = ["#4c9be8", "#e8793a", "#3fae6a", "#d65f8f", "#a17fe0",
                "#b59a1e", "#2fb5b5", "#e05252", "#8a8f98", "#b0764c"];
const DASHES = ["", "6 3", "2 3"];
const SCALE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

// ---- numbers on an axis ----

// Round numbers over a range, about so many steps of them.
function ticks(low, high, steps = 4) {
  const rough = (high - low) / steps;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((one) => one >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9); tick * step <= high + step * 1e-9; tick++) {
    found.push(tick * step);
  }
  return found;
}

// The least and the greatest of some numbers; `isRoomy` adds a little on both sides.
function rangeOf(values, isRoomy) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [0, 1]; // There is no number.
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const room = isRoomy ? 0.04 * (high - low) : 0;
  return [low - room, high + room];
}

const tickText = (tick, percent) =>
  (percent ? `${Number((100 * tick).toPrecision(3))} %` : show(Number(tick.toPrecision(3))));

// ---- lines and points ----

const strokeOf = (place) => ({
  stroke: COLORS[place % COLORS.length],
  "stroke-dasharray": DASHES[Math.floor(place / COLORS.length) % DASHES.length],
});

// The range of y that some series need; `zero`: 0 is in it.
export const heightsOf = (series, zero) => rangeOf([...(zero ? [0] : []),
  ...series.flatMap(({points}) => points).flatMap(({y, lower, upper}) => [y, lower, upper])
    .filter(isNumber)], true);

// Lines or points over two axes of numbers; `legendOf` tells the series apart.
//
// name: what the figure shows. kind: "line" or "scatter". x, y: names of the axes.
// series: [{name, place, points: [{x, y, lower, upper, text}]}]; `place` gives the colour, the place in
//   the list if there is none; between `lower` and `upper` a band is drawn; `text` is told when a point
//   is pointed at.
// percent: {x, y}: which of them are shares. heights: range of y. width: of the box to fit in.
export function xyChart({name, kind, x, y, series, percent = {}, heights = heightsOf(series, false),
                         width = 640}) {
  const height = Math.min(320, Math.max(220, width / 2));
  const left = 58, right = 18, top = 22, bottom = 40;
  const points = series.flatMap((one) => one.points);
  const whole = points.every((point) => Number.isInteger(point.x));
  const [first, last] = rangeOf(points.map((point) => point.x), kind === "scatter");
  const [low, high] = heights;
  const atX = (value) => left + (value - first) / (last - first) * (width - left - right);
  const atY = (value) => height - bottom - (value - low) / (high - low) * (height - top - bottom);
  const axes = [
    ticks(low, high).flatMap((tick) => [
      s("line", {class: "grid", x1: left, x2: width - right, y1: atY(tick), y2: atY(tick)}),
      s("text", {x: left - 6, y: atY(tick) + 4, "text-anchor": "end"}, tickText(tick, percent.y)),
    ]),
    ticks(first, last, width > 480 ? 8 : 4).filter((tick) => !whole || Number.isInteger(tick)).map((tick) =>
      s("text", {x: atX(tick), y: height - bottom + 16, "text-anchor": "middle"},
        tickText(tick, percent.x))),
    s("line", {class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}),
    s("text", {x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle"}, x),
    s("text", {x: 4, y: 12}, y),
  ];
  const at = (point, value) => `${atX(point.x)},${atY(value)}`;
  const drawn = series.map((one, index) => {
    const place = one.place ?? index, stroke = strokeOf(place);
    const banded = one.points.filter(({lower, upper}) => isNumber(lower) && isNumber(upper));
    const edge = [...banded.map((point) => at(point, point.upper)),
      ...banded.map((point) => at(point, point.lower)).reverse()];
    return s("g", {"data-series": place},
      banded.length > 1 ? s("polygon", {class: "band", points: edge.join(" "), fill: stroke.stroke}) : null,
      kind === "line" ? s("polyline", {class: "line", ...stroke,
        points: one.points.map((point) => at(point, point.y)).join(" ")}) : null,
      one.points.map((point) => s("circle", {class: kind === "scatter" ? "point" : null, cx: atX(point.x),
        cy: atY(point.y), r: kind === "scatter" ? 3.2 : 2.4, fill: stroke.stroke},
        s("title", {}, point.text))));
  });
  return scrollBox(name, svg(name, width, height, axes, drawn));
}

const svg = (name, width, height, ...children) =>
  s("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name},
    children);

// Buttons that bring one series of some charts forward; null if there is but one. The place of a name
// is that of its series.
export function legendOf(names, charts) {
  if (names.length < 2) return null;
  const buttons = names.map((name, place) => h("button",
    {type: "button", class: "key", "aria-pressed": "false", onclick: () => press(place)},
    s("svg", {width: 26, height: 10, "aria-hidden": "true"},
      s("line", {x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 3, ...strokeOf(place)})), name));

  function press(place) {
    const isOn = buttons[place].getAttribute("aria-pressed") !== "true";
    buttons.forEach((button, other) => button.setAttribute("aria-pressed", String(isOn && other === place)));
    for (const group of charts.flatMap((chart) => [...chart.querySelectorAll("[data-series]")])) {
      group.classList.toggle("dim", isOn && group.dataset.series !== String(place));
    }
  }

  return h("div", {class: "legend", role: "group", "aria-label": "Bring one forward"}, buttons);
}

// ---- bars ----

// Lying bars, one for each [label, value], in the given order; values may be below zero.
export function barChart({name, y, bars, width = 640}) {
  const size = 22, top = 8, bottom = 36, right = 64;
  const left = 12 + 6.6 * Math.max(...bars.map(([label]) => short(label, 24).length));
  const height = top + size * bars.length + bottom;
  const [low, high] = rangeOf([0, ...bars.map(([, value]) => value)], false);
  const at = (value) => left + (value - low) / (high - low) * Math.max(width - left - right, 60);
  const axes = [
    ticks(low, high).flatMap((tick) => [
      s("line", {class: "grid", x1: at(tick), x2: at(tick), y1: top, y2: height - bottom}),
      s("text", {x: at(tick), y: height - bottom + 14, "text-anchor": "middle"}, tickText(tick)),
    ]),
    s("text", {x: (at(low) + at(high)) / 2, y: height - 4, "text-anchor": "middle"}, y),
  ];
  const drawn = bars.map(([label, value], place) => {
    const middle = top + size * (place + 0.5);
    const [start, end] = [at(Math.min(value, 0)), at(Math.max(value, 0))];
    return s("g", {}, s("title", {}, `${label}: ${show(value)}`),
      s("text", {x: left - 8, y: middle + 4, "text-anchor": "end"}, short(label, 24)),
      s("rect", {x: start, y: middle - 7, width: Math.max(end - start, 1), height: 14, rx: 2,
                 fill: COLORS[0]}),
      s("text", {x: end + 5, y: middle + 4}, show(value)));
  });
  return scrollBox(name, svg(name, width, height, axes, drawn));
}

// ---- heat maps ----

function colorOf(share) {
  const place = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1);
  const index = Math.min(Math.floor(place), SCALE.length - 2);
  return SCALE[index].map((low, channel) =>
    Math.round(low + (place - index) * (SCALE[index + 1][channel] - low)));
}
const rgb = (channels) => `rgb(${channels.join(" ")})`;

// Whether white stands out from a colour more than black does (WCAG relative luminance).
function isDark(channels) {
  const [red, green, blue] = channels.map((channel) => {
    const share = channel / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179;
}

// The range of the colours of some values; 0 is in it.
export function colorRange(values) {
  const numbers = values.filter(isNumber);
  const [low, high] = [Math.min(0, ...numbers), Math.max(0, ...numbers)];
  return [low, high > low ? high : 1];
}

// A map of coloured cells; `scaleOf` gives the scale.
//
// down, across: names of rows and columns. cells: [{down, across, value, text, note, isMarked}]: value or
// null, what stands in the cell, what is told when it is pointed at, whether it has a frame.
// range: values of the first and the last colour. size: of a cell.
export function heatMap({name, down, across, cells, range, size}) {
  const [low, high] = range;
  const longest = (names) => Math.max(...names.map((text) => short(text).length));
  const left = 10 + 6.8 * longest(down), top = 12 + 5 * longest(across);
  // The last labels lean out to the right.
  const width = left + size * across.length + 5 * longest(across);
  const height = top + size * down.length + 4;
  const downAt = new Map(down.map((text, place) => [text, place]));
  const acrossAt = new Map(across.map((text, place) => [text, place]));
  const labels = [
    down.map((text, place) => s("text",
      {x: left - 6, y: top + size * (place + 0.5) + 4, "text-anchor": "end"},
      short(text), s("title", {}, text))),
    across.map((text, place) => {
      const x = left + size * (place + 0.5), y = top - 6;
      return s("text", {x, y, transform: `rotate(-45 ${x} ${y})`}, short(text), s("title", {}, text));
    }),
  ];
  const drawn = cells.map((cell) => {
    const x = left + size * acrossAt.get(cell.across), y = top + size * downAt.get(cell.down);
    const box = {x: x + 0.5, y: y + 0.5, width: size - 1, height: size - 1, rx: 2};
    const color = isNumber(cell.value) ? colorOf((cell.value - low) / (high - low)) : null;
    return s("g", {}, s("title", {}, cell.note),
      s("rect", color ? {...box, fill: rgb(color)} : {...box, class: "empty"}),
      color && size >= 24 ? s("text", {x: x + size / 2, y: y + size / 2 + 4, "text-anchor": "middle",
        class: isDark(color) ? "light" : "dark"}, cell.text) : null,
      cell.isMarked ? s("rect", {...box, class: "marked"}) : null);
  });
  return scrollBox(name, svg(name, width, height, labels, drawn));
}

// The colours of a heat map between its ends as text.
export function scaleOf(low, high) {
  const id = newId("scale");
  const stops = SCALE.map((channels, index) =>
    s("stop", {offset: index / (SCALE.length - 1), "stop-color": rgb(channels)}));
  return h("div", {class: "scale"}, low,
    s("svg", {width: 120, height: 12, "aria-hidden": "true"}, s("linearGradient", {id}, stops),
      s("rect", {width: 120, height: 12, rx: 2, fill: `url(#${id})`})), high);
}
