// Requests to the server. docs/service.md has the endpoints.

import * as session from "./session.js";

// What the server refused: `kind` is one word such as "syntax" or "timeout".
export class ApiError extends Error {
  constructor(status, kind, message) {
    super(message);
    this.status = status;
    this.kind = kind;
  }
}

async function request(method, path, {body, signal, token = session.token()} = {}) {
  const headers = {Authorization: `Bearer ${token}`};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {method, headers, signal, cache: "no-store",
                                  body: body === undefined ? undefined : JSON.stringify(body)});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  throw await refusal(response);
}

async function refusal(response) {
  const text = await response.text();
  try {
    const {kind, message} = JSON.parse(text).error;
    return new ApiError(response.status, kind, message);
  } catch {
    // A proxy in between may answer with a page of its own.
    return new ApiError(response.status, "internal", `The server answered ${response.status}.`);
  }
}

// As `request`, but a token that is no longer right ends the session.
async function authorised(method, path, options) {
  try {
    return await request(method, path, options);
  } catch (error) {
    if (error.status === 401) session.end("The server no longer takes this token: log in again.");
    throw error;
  }
}

const query = (params) => {
  const given = Object.entries(params).filter(([, value]) => value !== null && value !== undefined);
  return given.length ? `?${new URLSearchParams(given)}` : "";
};

// A path of which each part may hold anything.
export const path = (...parts) => `api/${parts.map(encodeURIComponent).join("/")}`;

export const get = async (at, params = {}, signal = undefined) =>
  (await authorised("GET", at + query(params), {signal})).json();

export const post = async (at, body, signal = undefined) =>
  (await authorised("POST", at, {body, signal})).json();

export const remove = async (at, signal = undefined) =>
  (await authorised("DELETE", at, {signal})).json();

// The answer to a query as a file: its bytes, and why rows are missing ("no" if none are).
export async function download(body) {
  const response = await authorised("POST", path("sql"), {body});
  return {blob: await response.blob(), truncated: response.headers.get("X-Actlake-Truncated")};
}

// Whether the server takes this token.
export async function isAccepted(token) {
  if (!/^[\x21-\x7e]+$/.test(token)) return false; // A header cannot even carry it.
  try {
    await request("GET", path("studies"), {token});
    return true;
  } catch (error) {
    if (error.status === 401) return false;
    throw error;
  }
}
