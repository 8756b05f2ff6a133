// Elements. All that comes from the store becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

// An HTML element. A function as the value of `onclick` and the like is called at that event; false,
// null and undefined leave an attribute out.
export const h = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

// An SVG element.
export const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

let ids = 0;
export const newId = (name) => `${name}-${++ids}`;

// Puts these children, and no others, into an element.
export function put(node, ...children) {
  node.replaceChildren();
  return fill(node, {}, children);
}

// The keyboard stops at what it has to scroll, and at nothing else.
const reach = new ResizeObserver((entries) => {
  for (const {target} of entries) {
    const isWide = target.scrollWidth > target.clientWidth + 1;
    target.tabIndex = isWide || target.scrollHeight > target.clientHeight + 1 ? 0 : -1;
  }
});

// A box with a name that scrolls by itself, so that the page does not.
export function scrollBox(name, ...children) {
  const box = h("div", {class: "scroll", role: "group", "aria-label": name}, children);
  reach.observe(box);
  return box;
}

// A control with its name beside it.
export const labelled = (name, control) => h("label", {class: "field"}, h("span", {}, name), control);

// A list to choose from; `choices` are values, or pairs of a value and its text.
export function select(choices, chosen, onchange) {
  const options = choices.map((choice) => {
    const [value, text] = Array.isArray(choice) ? choice : [choice, choice];
    return h("option", {value, selected: String(value) === String(chosen)}, String(text));
  });
  return h("select", {onchange}, options);
}

// A slider through some values. `text` gives what stands beside it, `name` is that of the control;
// `oninput` gets each value that is passed, `onchange` the one it is left at.
export function slider(values, chosen, {name, text, oninput = () => {}, onchange = () => {}}) {
  const start = values.indexOf(chosen);
  const output = h("output", {}, text(chosen));
  const picked = () => values[Number(range.value)];
  const range = h("input", {type: "range", name, min: 0, max: values.length - 1, step: 1, value: start,
    "aria-valuetext": text(chosen),
    oninput: () => {
      output.textContent = text(picked());
      range.setAttribute("aria-valuetext", output.textContent);
      oninput(picked());
    },
    onchange: () => onchange(picked())});
  return h("span", {class: "slider"}, range, output);
}

// A sentence in which `such parts` are code.
export const sentence = (text) =>
  text.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));
