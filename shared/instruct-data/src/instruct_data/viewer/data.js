"use strict";
// The embedded data: the head (all short columns) is unpacked at once, texts in blocks when they are needed.

const bytesOf = (base64) => {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const characters = atob(base64), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
};

async function unpack(id) {
  const bytes = bytesOf(document.getElementById(id).textContent);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const data = { rows: 0, columns: [], byName: new Map(), texts: [], score: null };
const blocks = new Map();

async function loadHead() {
  const head = await unpack("head");
  Object.assign(data, head);
  data.columns.forEach((column, index) => { column.index = index; column.label = column.name; prepare(column); });
  data.original = data.columns.slice();
  data.texts = data.original.filter((column) => column.kind === "text");
  // Lengths are columns of their own: sort and filter by them (are long answers favoured?).
  for (const column of data.texts) {
    const lengths = numbers(column.length);
    column.lengths = lengths.numbers;
    data.columns.push({ name: `length:${column.name}`, label: `${column.name}, characters`, kind: "number", derived: true, ...lengths });
  }
  for (const column of data.columns) data.byName.set(column.name, column);
  data.score = data.byName.get(data.score) || null;
  data.shownTexts = data.text.map((name) => data.byName.get(name));
  data.previews = data.texts.filter((column) => column.preview);
  // Unpacked texts stay in memory while they may all do so.
  data.keep = data.characters < 2.5e8 ? Infinity : 96;
}

function prepare(column) {
  if (column.kind === "number") Object.assign(column, numbers(column.values));
  if (column.kind === "category") {
    const yesNo = column.values.length > 0 && column.values.every((value) => typeof value === "boolean");
    column.names = column.values.map((value) => yesNo ? (value ? "yes" : "no") : String(value));
    column.yesNo = yesNo;
  }
}

// Doubles, NaN where there is none; nothing outside this file sees a NaN as a number.
function numbers(values) {
  const result = new Float64Array(values.length);
  let whole = true, least = Infinity, greatest = -Infinity, none = 0;
  for (let row = 0; row < values.length; row++) {
    const value = values[row];
    if (value === null) { result[row] = NaN; none++; continue; }
    result[row] = value;
    if (value < least) least = value;
    if (value > greatest) greatest = value;
    if (whole && !Number.isInteger(value)) whole = false;
  }
  return { numbers: result, whole, least, greatest, none, values: undefined };
}

function block(column, number) {
  const id = `text-${column.index}-${number}`;
  let found = blocks.get(id);
  if (!found) {
    found = unpack(id);
    blocks.set(id, found);
    if (blocks.size > data.keep) blocks.delete(blocks.keys().next().value);
  }
  return found;
}

const textOf = async (column, row) => (await block(column, Math.floor(row / data.block)))[row % data.block];

// The value of a short column as it was given; null where there is none.
function valueOf(column, row) {
  if (column.kind === "number") return Number.isNaN(column.numbers[row]) ? null : column.numbers[row];
  if (column.kind === "category") return column.codes[row] < 0 ? null : column.values[column.codes[row]];
  return column.values[row];
}

// Unpack ahead of the search, from the moment that someone reaches for it.
async function warm() {
  if (data.keep === Infinity)
    for (let number = 0; number * data.block < data.rows; number++) await Promise.all(data.texts.map((column) => block(column, number)));
}

// The whole record, keys in the order they came in, keys that it did not have left out.
async function recordOf(row) {
  const record = {};
  for (const column of data.original) {
    if (column.missing) {
      column.absent ??= new Set(column.missing);
      if (column.absent.has(row)) continue;
    }
    // Not an assignment: a key "__proto__" must stay a key.
    const value = column.kind === "text" ? await textOf(column, row) : valueOf(column, row);
    Object.defineProperty(record, column.name, { value, enumerable: true, configurable: true, writable: true });
  }
  return record;
}

const grouped = (count) => count.toLocaleString("en-US").replaceAll(",", "\u202f");

function formatted(value, whole) {
  if (whole) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toFixed(size < 10 ? 4 : size < 1000 ? 2 : 1);
}

function el(tag, properties = {}, ...children) {
  const { dataset, style, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  Object.assign(element.style, style);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const $ = (id) => document.getElementById(id);
