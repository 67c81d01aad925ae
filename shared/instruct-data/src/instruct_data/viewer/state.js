// What the reader has chosen, and the same in the address after "#", so that a link or a reload shows it again.

const state = { query: "", sort: null, down: true, ranges: new Map(), picks: new Map(), axis: null, shown: null, row: null };
let written = "";

function initialState() {
  return { query: "", sort: data.score || null, down: true, ranges: new Map(), picks: new Map(),
    axis: data.score || data.columns.find((column) => column.kind === "number") || null, shown: null, row: null };
}

function writeHash() {
  const start = initialState(), hash = new URLSearchParams();
  if (state.query) hash.set("q", state.query);
  if (state.sort !== start.sort || state.down !== start.down)
    hash.set("sort", `${state.down ? "-" : "+"}${state.sort ? state.sort.name : ""}`);
  if (state.axis !== start.axis) hash.set("plot", state.axis.name);
  for (const [column, range] of state.ranges)
    hash.set(`r.${column.name}`, range.none ? "none" : `${range.low ?? ""}..${range.high ?? ""}`);
  for (const [column, codes] of state.picks)
    for (const code of codes) hash.append(code < 0 ? `n.${column.name}` : `f.${column.name}`, code < 0 ? "1" : column.names[code]);
  if (state.shown) hash.set("columns", JSON.stringify(state.shown.map((column) => column.name)));
  if (state.row !== null) hash.set("row", state.row);
  const text = hash.toString();
  if (text === written) return;
  written = text;
  history.replaceState(null, "", text ? `#${text}` : "#");
}

// Names that this page does not have are passed over: the link may come from another result.
function readHash() {
  const hash = new URLSearchParams(location.hash.slice(1));
  Object.assign(state, initialState());
  state.query = hash.get("q") || "";
  const sort = hash.get("sort");
  if (sort !== null && (sort.length === 1 || data.byName.has(sort.slice(1)))) {
    state.down = sort[0] !== "+" && sort[0] !== " ";
    state.sort = data.byName.get(sort.slice(1)) || null;
  }
  const axis = data.byName.get(hash.get("plot"));
  if (axis && axis.kind === "number") state.axis = axis;
  for (const [key, value] of hash) readFilter(key, value);
  const row = hash.get("row");
  if (row !== null && /^\d+$/.test(row) && Number(row) < data.rows) state.row = Number(row);
  try {
    const names = JSON.parse(hash.get("columns"));
    if (Array.isArray(names)) state.shown = names.map((name) => data.byName.get(name)).filter(Boolean);
  } catch { /* a mangled link shows the usual columns */ }
  written = location.hash.slice(1);
}

function readFilter(key, value) {
  const column = data.byName.get(key.slice(2));
  if (!column) return;
  if (key.startsWith("r.") && column.kind === "number") {
    if (value === "none") return void state.ranges.set(column, { low: null, high: null, none: true });
    const ends = /^([^.]*(?:\.\d[^.]*)?)\.\.(.*)$/.exec(value);
    if (!ends) return;
    const [low, high] = ends.slice(1).map((end) => (end === "" || !Number.isFinite(Number(end)) ? null : Number(end)));
    if (low !== null || high !== null) state.ranges.set(column, { low, high, none: false });
  } else if (column.kind === "category" && (key.startsWith("f.") || key.startsWith("n."))) {
    const codes = key[0] === "n" ? [-1] : column.names.flatMap((name, code) => (name === value ? [code] : []));
    for (const code of codes) pickedOf(column).add(code);
  }
}

function pickedOf(column) {
  if (!state.picks.has(column)) state.picks.set(column, new Set());
  return state.picks.get(column);
}
