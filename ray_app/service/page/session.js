// The token of this browser session. It never leaves the tab but in the header of a request.

const KEY = "actlake-token";

export const token = () => sessionStorage.getItem(KEY);
export const keep = (value) => sessionStorage.setItem(KEY, value);

// Forgets the token and all else that the tab kept. `reason` is told at the log-in.
export function end(reason = "") {
  sessionStorage.clear();
  window.dispatchEvent(new CustomEvent("actlake-logged-out", {detail: reason}));
}

// Takes the token out of an address like http://127.0.0.1:8600/#token=..., so that it does not stay
// in the address bar or in the history.
export function takeFromAddress() {
  const given = /^#token=(.+)$/.exec(location.hash);
  if (!given) return;
  keep(decodeURIComponent(given[1]));
  history.replaceState(null, "", "#/sql");
}
