// The answer to a query: a table or a chart, what is missing of it, and files of it.

import * as api from "../api.js";
import {h, put} from "../shared/dom.js";
import {isNumericType, plural, showExact} from "../shared/format.js";
import {hrefOf} from "../routes.js";
import {nothing, problem} from "../states.js";
import {tableOf} from "../shared/table.js";
import {pictureOf} from "./picture.js";

const MISSING = {
  rows: "there are more. Allow more rows, or ask for less: a limit, a filter, a sum.",
  bytes: "the answer is larger than the server sends at once. Ask for fewer columns or rows.",
};

// What to show of an answer; `asked` is the request, for the files.
export function answerOf(made, asked) {
  if (!made.columns.length) return nothing("The answer has no columns.");
  const views = {
    Table: () => (made.rows.length ? tableOf("Rows of the answer", columnsOf(made), made.rows,
      {sortable: true}) : nothing("The query is right, but no row answers it.")),
    Chart: () => pictureOf(made),
  };
  const body = h("div", {class: "answer-body"});
  const choose = (name) => put(body, views[name]());
  // A chart measures its box, which must be on the page by then.
  choose("Table");
  return [
    made.truncated === "no" ? null : h("p", {class: "notice"},
      h("strong", {}, `Only the first ${plural(made.num_rows, "row")}: `), MISSING[made.truncated]),
    h("div", {class: "bar"},
      h("fieldset", {class: "choice"}, h("legend", {class: "unseen"}, "Show the answer as"),
        Object.keys(views).map((name) => h("label", {},
          h("input", {type: "radio", name: "shown", value: name, checked: name === "Table",
                      onchange: () => choose(name)}), h("span", {}, name)))),
      filesOf(asked)),
    body,
  ];
}

// Neurons of an answer lead to their page, if a row says which neuron it is.
function columnsOf({columns}) {
  const place = Object.fromEntries(columns.map(({name}, index) => [name, index]));
  const isNeuron = ["run", "site", "layer", "neuron"].every((name) => name in place);
  return columns.map(({name, type}) => ({
    name, label: name, note: type.toLowerCase(), numeric: isNumericType(type),
    cell: (value, row) => {
      if (value === null) return h("span", {class: "null"}, "null");
      if (name !== "neuron" || !isNeuron) return showExact(value);
      const parts = ["run", "site", "layer", "neuron"].map((part) => row[place[part]]);
      return h("a", {href: hrefOf("neuron", parts)}, showExact(value));
    },
  }));
}

// Buttons that ask again and keep the answer as a file.
function filesOf(asked) {
  const told = h("span", {role: "status"});
  const kinds = {CSV: ["csv", "csv"], JSON: ["json", "json"], Arrow: ["arrow", "arrows"]};
  const buttons = Object.entries(kinds).map(([name, [format, ending]]) =>
    h("button", {type: "button", class: "plain", onclick: () => save(format, ending),
                 "aria-label": `Download as ${name}`}, name));

  async function save(format, ending) {
    put(told, "Asking …");
    try {
      const {blob, truncated} = await api.download({...asked, format});
      const address = URL.createObjectURL(blob);
      h("a", {href: address, download: `answer.${ending}`}).click();
      setTimeout(() => URL.revokeObjectURL(address), 60000);
      put(told, truncated && truncated !== "no" ? "The file holds the first rows only." : "Saved.");
    } catch (error) {
      put(told, problem(error));
    }
  }

  return h("div", {class: "files"}, h("span", {}, "Download"), buttons, told);
}
