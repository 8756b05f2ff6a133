// Values as text for people.

export const isNumber = (value) => typeof value === "number";
export const words = (column) => column.replaceAll("_", " ");
export const distinct = (values) => [...new Set(values)];

// A number of a table of ours: whole ones grouped, others to four digits.
export function show(value, percent = false) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map((one) => show(one)).join(", ");
  if (typeof value === "object") return parts(value);
  if (!isNumber(value)) return String(value);
  if (percent) return `${(100 * value).toFixed(1)} %`;
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  if (Math.abs(value) < 1e-3) return value.toExponential(1);
  if (Math.abs(value) >= 1e4) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

// A record in one line, without what is not set.
const parts = (record) => Object.entries(record).filter(([, value]) => !isUnset(value))
  .map(([name, value]) => `${words(name)} ${show(value)}`).join(" · ");

// Whether a setting says nothing: null, or an empty list or record.
export const isUnset = (value) =>
  value === null || (typeof value === "object" && Object.keys(value).length === 0);

// A value of an answer to SQL: whole numbers as they are, as they may be ids; others to six digits.
export function showExact(value) {
  if (value === null) return "null";
  if (typeof value === "object") return JSON.stringify(value);
  if (!isNumber(value) || Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1e-4 ? value.toExponential(4) : String(Number(value.toPrecision(6)));
}

// Whether a DuckDB type is one of numbers.
export const isNumericType = (type) =>
  /^(U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|REAL|BIGNUM|DECIMAL(\(.*\))?)$/i.test(type);

// A number of an answer, which comes as text where JSON could not hold it; null if it is none.
export function toNumber(value) {
  const number = typeof value === "string" ? Number(value) : value;
  return isNumber(number) && Number.isFinite(number) ? number : null;
}

// A time in UTC as the store has it, to the minute.
export const showTime = (time) => (time ? `${String(time).slice(0, 16).replace("T", " ")} UTC` : "–");

export const plural = (count, noun) => `${show(count)} ${noun}${count === 1 ? "" : "s"}`;

// Text short enough for a label of a figure.
export const short = (text, length = 16) =>
  text.length > length ? `${text.slice(0, length - 1)}…` : text;
