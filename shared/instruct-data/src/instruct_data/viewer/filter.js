// From all rows to those shown: how many filters each row fails, then the sorted rows that fail none.

const result = { view: new Uint32Array(0), failed: null, filters: [], hits: null };
const orders = new Map();

function testOf(column) {
  const range = state.ranges.get(column);
  if (range) {
    const { numbers: values } = column, low = range.low ?? -Infinity, high = range.high ?? Infinity;
    return range.none ? (row) => Number.isNaN(values[row]) : (row) => values[row] >= low && values[row] <= high;
  }
  const codes = state.picks.get(column);
  return codes && codes.size ? (row) => codes.has(column.codes[row]) : null;
}

function filterRows() {
  const failed = new Uint16Array(data.rows);
  result.filters = data.columns.map((column) => ({ column, test: testOf(column) })).filter(({ test }) => test);
  if (result.hits) result.filters.push({ column: null, test: (row) => result.hits[row] === 1 });
  for (const { test } of result.filters) for (let row = 0; row < data.rows; row++) if (!test(row)) failed[row]++;
  result.failed = failed;
  result.view = orderOf(state.sort, state.down).filter((row) => failed[row] === 0);
}

// Does the row pass all filters but this column's own? (What a histogram or a list of values has to count.)
function passesOthers(column) {
  const own = result.filters.find((filter) => filter.column === column);
  const { failed } = result;
  return own ? (row) => failed[row] === 0 || (failed[row] === 1 && !own.test(row)) : (row) => failed[row] === 0;
}

// Rows in order; those without a value come last both ways, ties keep the order of the file.
function orderOf(column, down) {
  const key = `${down}:${column ? column.name : ""}`;
  if (!orders.has(key)) orders.set(key, sorted(column, down));
  return orders.get(key);
}

function sorted(column, down) {
  const order = Uint32Array.from({ length: data.rows }, (_, row) => row);
  if (!column) return down ? order : order.reverse();
  const rank = ranks(column), sign = down ? -1 : 1;
  return order.sort((a, b) => {
    const one = rank[a], two = rank[b];
    if (Number.isNaN(one) || Number.isNaN(two)) return Number.isNaN(one) - Number.isNaN(two) || a - b;
    return sign * (one - two) || a - b;
  });
}

// A number for every row that sorts as the column does.
function ranks(column) {
  if (column.kind === "number") return column.numbers;
  if (column.kind === "text" && !column.preview) return column.lengths;
  const words = column.kind === "category" ? column.names : column.kind === "text" ? column.preview : column.values;
  const collator = new Intl.Collator("en", { numeric: true });
  const unique = [...new Set(words)].filter((word) => word !== null && word !== "");
  unique.sort((a, b) => collator.compare(a, b));
  const place = new Map(unique.map((word, index) => [word, index]));
  const rankOf = (word) => place.get(word) ?? NaN;
  if (column.kind !== "category") return Float64Array.from(words, rankOf);
  const byCode = words.map(rankOf);
  return Float64Array.from(column.codes, (code) => (code < 0 ? NaN : byCode[code]));
}

// Words, all of which must be there; "several words" in quotation marks stand together. Case is ignored.
const termsOf = (query) => [...query.toLowerCase().matchAll(/"([^"]+)"?|(\S+)/g)].map((found) => found[1] ?? found[2])
  .filter((term) => term !== '"');

let searching = 0;

// Sets result.hits. Gives way to the reader's next key; returns false if another search has begun meanwhile.
async function search(query, progress) {
  const turn = ++searching, terms = termsOf(query);
  if (!terms.length) { result.hits = null; return true; }
  const hits = new Uint8Array(data.rows);
  const short = data.original.filter((column) => column.kind === "label" || (column.kind === "category" && !column.yesNo));
  let rest = performance.now();
  for (let start = 0; start < data.rows; start += data.block) {
    const texts = await Promise.all(data.texts.map((column) => block(column, start / data.block)));
    if (turn !== searching) return false;
    const end = Math.min(start + data.block, data.rows);
    for (let row = start; row < end; row++) if (contains(row, row - start, texts, short, terms)) hits[row] = 1;
    if (performance.now() - rest > 40) {
      progress(end / data.rows);
      await new Promise((resume) => setTimeout(resume));
      if (turn !== searching) return false;
      rest = performance.now();
    }
  }
  result.hits = hits;
  return true;
}

function contains(row, place, texts, short, terms) {
  let words = "";
  for (const values of texts) words += `${wordsOf(values[place])}\n`;
  for (const column of short) words += `${valueOf(column, row) ?? ""}\n`;
  words = words.toLowerCase();
  return terms.every((term) => words.includes(term));
}

// The strings of a value, as flat() of values.py has them: a conversation is found by its words, not by its keys.
function wordsOf(value) {
  if (value === null) return "";
  if (typeof value === "string") return value;
  if (typeof value !== "object") return JSON.stringify(value);
  if (!Array.isArray(value)) {
    if (typeof value.value === "string") return value.value;
    if (typeof value.content === "string") return value.content;
  }
  return Object.values(value).map(wordsOf).filter(Boolean).join(" ");
}
