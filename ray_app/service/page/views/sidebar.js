// Beside the console: example questions, the tables with their columns, and what was asked before.

import * as api from "../api.js";
import {h, labelled, put} from "../shared/dom.js";
import {plural} from "../shared/format.js";
import {nothing, settle} from "../states.js";

const KEY = "actlake-queries";
const MOST = 30;

// `write` puts a query into the editor, `insert` a name at the cursor.
export function openSidebar(box, signal, {write, insert}) {
  const isWide = window.matchMedia("(min-width: 60rem)").matches;
  const parts = ["Example questions", "Tables", "Asked in this session"].map((title, place) => {
    const list = h("div", {class: "part"});
    const part = h("details", {open: isWide && place < 2}, h("summary", {}, title), list);
    return {part, list};
  });
  const [examples, tables, asked] = parts.map(({list}) => list);
  put(box, parts.map(({part}) => part));
  settle(examples, "examples", async () =>
    queryList((await api.get(api.path("examples"), {}, signal)).examples, write));
  settle(tables, "tables", async () =>
    schemaOf((await api.get(api.path("schema"), {}, signal)).views, insert));
  parts[2].part.addEventListener("toggle", () => fillHistory(asked, write));
  window.addEventListener("actlake-asked", () => fillHistory(asked, write), {signal});
  fillHistory(asked, write);
}

const queryList = (queries, write) => h("ul", {class: "queries"}, queries.map(({title, query}) =>
  h("li", {}, h("button", {type: "button", class: "pick", title: query, onclick: () => write(query)},
    title))));

// ---- history ----

const past = () => JSON.parse(sessionStorage.getItem(KEY) ?? "[]");

// Keeps a query that was answered, in this tab only.
export function remember(query) {
  const others = past().filter((one) => one !== query);
  sessionStorage.setItem(KEY, JSON.stringify([query, ...others].slice(0, MOST)));
  window.dispatchEvent(new Event("actlake-asked"));
}

function fillHistory(box, write) {
  const queries = past();
  put(box, queries.length === 0 ? nothing("Nothing yet.")
    : queryList(queries.map((query) => ({title: query, query})), write));
}

// ---- tables ----

function schemaOf(views, insert) {
  const filter = h("input", {type: "search", autocomplete: "off", oninput: narrow});
  const found = h("p", {class: "hint", role: "status"});
  const entries = views.map((view) => ({view, box: viewOf(view, insert)}));

  function narrow() {
    const wanted = filter.value.trim().toLowerCase();
    let count = 0;
    for (const {view, box} of entries) {
      const inName = view.name.toLowerCase().includes(wanted);
      const inColumns = view.columns.some(({name}) => name.toLowerCase().includes(wanted));
      box.hidden = !(inName || inColumns);
      box.open = wanted !== "" && !inName && inColumns;
      count += !box.hidden;
    }
    found.textContent = wanted ? plural(count, "table") : "";
  }

  return [labelled("Find a table or column", filter), found,
    h("div", {class: "tables"}, entries.map(({box}) => box))];
}

function viewOf(view, insert) {
  const pick = (name) => h("button", {type: "button", class: "pick name",
    "aria-label": `Insert ${name}`, onclick: () => insert(name)}, name);
  return h("details", {class: "table"}, h("summary", {}, view.name),
    h("p", {}, view.purpose), view.grain ? h("p", {class: "hint"}, `Grain: ${view.grain}`) : null,
    h("ul", {class: "columns"},
      h("li", {}, pick(view.name), h("span", {}, "the table")),
      view.columns.map(({name, type, meaning}) =>
        h("li", {}, pick(name), h("span", {}, type.toLowerCase()),
          meaning ? h("p", {}, meaning) : null))));
}
