// Bars beside a number: how far something is, or how large it is beside others.

import {h, s} from "./shared/dom.js";
import {isNumber, show} from "./shared/format.js";

// How far something is, as a bar and in words; `unit` is not needed where the column says it.
export function progressOf(done, total, unit = "") {
  const text = `${show(done)} of ${show(total)} ${unit}`.trim();
  return h("span", {class: "progress"},
    h("progress", {max: Math.max(total, 1), value: done, "aria-label": text}),
    h("span", {}, text));
}

// A small bar for a part of `most`; the number itself stands beside it.
export function sizeBar(value, most) {
  const width = 64, share = most > 0 && isNumber(value) ? Math.abs(value) / most : 0;
  return s("svg", {class: "size", width, height: 8, "aria-hidden": "true"},
    s("rect", {class: "whole", width, height: 8, rx: 4}),
    s("rect", {class: "part-of", width: share && Math.max(share * width, 3), height: 8, rx: 4}));
}

// The bar and the number, for a cell of a table.
export const barCell = (value, most) =>
  h("span", {class: "bar-cell"}, sizeBar(value, most), h("span", {}, show(value)));
