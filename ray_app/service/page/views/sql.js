// The SQL console: a query, its answer as a table or a chart, and the same as a file.

import * as api from "../api.js";
import {h, labelled, put, select} from "../shared/dom.js";
import {plural, show} from "../shared/format.js";
import {hrefOf} from "../routes.js";
import {newest, problem} from "../states.js";
import {answerOf} from "./answer.js";
import {openSidebar, remember} from "./sidebar.js";

const FIRST = "select task, site, count(*) as neurons, avg(abs) as mean_abs\n"
  + "from neuron_stats\ngroup by all order by all";
const LIMITS = [100, 1000, 10000, 100000].map((limit) => [limit, show(limit)]);
const SECONDS = [[10, "10 s"], [30, "30 s"], [120, "2 min"]];

export async function openSql({body, signal}, route) {
  const editor = h("textarea", {id: "query", rows: 8, spellcheck: "false", autocapitalize: "off",
    autocomplete: "off", "aria-describedby": "query-hint", onkeydown: onKey, oninput: fit});
  const rows = select(LIMITS, 1000);
  const seconds = select(SECONDS, 30);
  const run = h("button", {type: "button", onclick: ask}, "Run");
  const cancel = h("button", {type: "button", class: "plain", disabled: true}, "Cancel");
  const clock = h("span", {class: "clock", "aria-hidden": "true"});
  const told = h("p", {class: "told", role: "status"});
  const answer = h("section", {class: "answer", "aria-label": "Answer"});
  const side = h("aside", {class: "side", "aria-label": "Tables, examples and history"});
  const next = newest(signal);

  function fit() {
    const lines = editor.value.split("\n").length;
    editor.rows = Math.min(Math.max(lines + 1, 6), 18);
  }

  function write(query) {
    editor.value = query;
    fit();
  }

  function onKey(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      ask();
    }
  }

  // What the server is asked, without how the answer comes back.
  const asked = () => ({query: editor.value, max_rows: Number(rows.value),
                        timeout_seconds: Number(seconds.value)});

  // The address names the query that was run last: it can be shared, and gone back to.
  function name(query) {
    const href = hrefOf("sql", [], {q: query});
    if (href !== location.hash) history.pushState(null, "", href);
  }

  async function ask() {
    const given = asked();
    if (!given.query.trim()) {
      put(answer, problem({kind: "syntax", message: "There is no query: write one, or choose an "
        + "example."}));
      return editor.focus();
    }
    const running = next();
    const stop = new AbortController();
    const stopClock = startClock(clock);
    name(given.query);
    cancel.disabled = false;
    cancel.onclick = () => stop.abort();
    told.textContent = "Running the query.";
    answer.setAttribute("aria-busy", "true");
    try {
      const made = await api.post(api.path("sql"), {...given, format: "json"},
        AbortSignal.any([running, stop.signal]));
      told.textContent = `${plural(made.num_rows, "row")} in ${showMilliseconds(made.elapsed_ms)}.`;
      put(answer, answerOf(made, given));
      remember(given.query);
    } catch (error) {
      if (running.aborted) return; // A newer query, or another view, has the place now.
      told.textContent = error.name === "AbortError" ? "The query was cancelled." : "";
      put(answer, error.name === "AbortError" ? null : problem(error));
    } finally {
      stopClock();
      if (!running.aborted) {
        cancel.disabled = true;
        answer.removeAttribute("aria-busy");
      }
    }
  }

  put(body,
    h("section", {class: "ask", "aria-label": "Query"},
      h("label", {for: "query", class: "above"}, "Query"), editor,
      h("p", {class: "hint", id: "query-hint"}, "One statement that reads. Ctrl or Cmd with Enter "
        + "runs it; the tables and examples can be put in with a click."),
      h("div", {class: "bar"}, run, cancel, labelled("Most rows", rows),
        labelled("Time limit", seconds), clock, told)),
    side,
    answer);
  write(route.query.get("q") ?? FIRST);
  openSidebar(side, signal, {write: (query) => {
    write(query);
    editor.focus();
  }, insert: (text) => insertInto(editor, text)});

  return (changed) => {
    const query = changed.query.get("q");
    if (query !== null && query !== editor.value) write(query);
  };
}

const showMilliseconds = (milliseconds) => (milliseconds < 1000
  ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`);

// Seconds that pass, for those who look; returns how to stop it.
function startClock(clock) {
  const began = performance.now();
  const timer = setInterval(() => {
    clock.textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`;
  }, 100);
  return () => {
    clearInterval(timer);
    clock.textContent = "";
  };
}

function insertInto(editor, text) {
  editor.setRangeText(text, editor.selectionStart, editor.selectionEnd, "end");
  editor.focus();
}
