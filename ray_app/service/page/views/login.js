// The log-in: a token, and what is wrong with it.

import {isAccepted} from "../api.js";
import {h, labelled, put} from "../shared/dom.js";
import * as session from "../session.js";
import {problem} from "../states.js";

// `done` is called once the server has taken the token.
export function openLogin(body, reason, done) {
  const field = h("input", {type: "password", autocomplete: "off", spellcheck: "false",
                            required: true});
  const button = h("button", {type: "submit"}, "Log in");
  const told = h("div", {"aria-live": "assertive"}, reason ? h("p", {class: "problem"}, reason) : null);

  async function enter(event) {
    event.preventDefault();
    const token = field.value.trim();
    button.disabled = true;
    try {
      if (await isAccepted(token)) {
        session.keep(token);
        return done();
      }
      put(told, h("p", {class: "problem"}, "The server does not take this token."));
      field.select();
    } catch (error) {
      put(told, problem(error));
    } finally {
      button.disabled = false;
    }
    field.focus();
  }

  put(body,
    h("form", {class: "login", onsubmit: enter},
      h("p", {}, "The server made a token at its first start and showed it once, with an address "
        + "that logs in by itself."),
      labelled("Token", field), told, button));
  field.focus();
}
