// What stands where there is nothing to show: loading, nothing there, gone wrong.

import {h, sentence} from "./shared/dom.js";

const TITLES = {
  syntax: "The query is wrong",
  refused: "The server refuses this",
  not_found: "There is no such thing",
  invalid: "This value cannot be used",
  too_large: "The request is too large",
  timeout: "It took too long",
  busy: "The server is busy",
  unauthorized: "The token is wrong",
  disabled: "Switched off",
  conflict: "This cannot be done now",
  unreachable: "No connection",
};

export const loading = (what) => h("p", {class: "state"}, `Loading ${what} …`);

// Says what is not there and what would put it there; `such parts` of the text are code.
export const nothing = (text) => h("p", {class: "state"}, sentence(text));

// What went wrong, read out at once.
export function problem(error) {
  return h("div", {class: "problem", role: "alert"},
    h("strong", {}, TITLES[error.kind] ?? "Something went wrong"),
    h("p", {}, error.message));
}

// Fills a box with what `work` gives, or with what went wrong. Work that was aborted leaves no trace.
export async function settle(box, what, work) {
  box.replaceChildren(loading(what));
  try {
    box.replaceChildren(...[await work()].flat(Infinity).filter(Boolean));
  } catch (error) {
    if (error.name === "AbortError") return;
    box.replaceChildren(problem(error));
    if (!error.kind) throw error; // Not of the server: a fault of this page, for its console.
  }
}

// Of several pieces of work only the newest goes on: the signal of the others is aborted.
export function newest(signal) {
  let last = new AbortController();
  return () => {
    last.abort();
    last = new AbortController();
    return AbortSignal.any([signal, last.signal]);
  };
}

// Calls `work` now, and again some time after it has ended, until it gives true or the signal is
// aborted; nothing is asked while the tab is hidden.
export async function repeat(milliseconds, signal, work) {
  while (!signal.aborted) {
    if (!document.hidden && await work()) return;
    await new Promise((resolve) => setTimeout(resolve, milliseconds));
  }
}
