// Addresses of the views: #/NAME/PART/PART?key=value. They can be kept, shared and gone back to.

// {name, parts, query} of the present address.
export function readRoute() {
  const [place, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [name, ...parts] = place.split("/").map(decode);
  return {name: name || "sql", parts, query: new URLSearchParams(query)};
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // Someone typed a lone %.
  }
}

// The address of a view; values of `query` that are null are left out.
export function hrefOf(name, parts = [], query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined);
  const place = [name, ...parts].map(encodeURIComponent).join("/");
  return `#/${place}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
}

// Goes to an address, as a link would.
export const go = (href) => {
  location.hash = href;
};

// Names what is shown already, without a new entry in the history.
export const rename = (href) => history.replaceState(null, "", href);
