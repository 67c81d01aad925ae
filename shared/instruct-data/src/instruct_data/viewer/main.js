// Puts the parts together: every change goes through changed(), every record through choose().

const shownAll = new Set();

function changed() {
  filterRows();
  $("list").scrollTop = 0;
  draw();
}

function draw() {
  const all = data.rows, some = result.view.length;
  $("count").textContent = some === all ? `${grouped(all)} record${all === 1 ? "" : "s"}` : `${grouped(some)} of ${grouped(all)} records`;
  $("sort").value = state.sort ? state.sort.name : "";
  $("direction").textContent = state.down ? "↓" : "↑";
  $("direction").title = state.down ? "Descending; click for ascending" : "Ascending; click for descending";
  $("direction").ariaLabel = $("direction").title;
  $("axis").value = state.axis ? state.axis.name : "";
  $("download").disabled = some === 0;
  drawPlot();
  drawFacets();
  drawChips();
  drawHead();
  drawList();
  writeHash();
}

function choose(row, open = false) {
  state.row = row;
  drawRows();
  writeHash();
  if (open) document.body.classList.add("opened");
  if (row === null) { document.body.classList.remove("opened"); $("list").focus({ preventScroll: true }); }
  return drawDetail();
}

function drawFacets() {
  const columns = data.original.filter((column) => column.kind === "category" && column.values.length + column.codes.includes(-1) > 1);
  const rank = ({ name }) => (name === "selected" ? 0 : name === "status" ? 1 : 2);
  columns.sort((a, b) => rank(a) - rank(b) || a.index - b.index);
  $("facets").replaceChildren(...columns.map(drawFacet));
}

function drawFacet(column) {
  const counts = new Map([...column.values.keys()].map((code) => [code, 0])), passes = passesOthers(column);
  for (let row = 0; row < data.rows; row++) {
    const code = column.codes[row];
    counts.set(code, (counts.get(code) || 0) + passes(row));
  }
  const picked = state.picks.get(column) || new Set();
  const codes = column.yesNo ? [...counts.keys()].sort((a, b) => (a < 0) - (b < 0) || column.values[b] - column.values[a])
    : [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b);
  const few = shownAll.has(column.name) || codes.length <= 9 ? codes : codes.filter((code, place) => place < 8 || picked.has(code));
  const box = el("fieldset", { dataset: { column: column.name } }, el("legend", {}, el("bdi", { textContent: column.name })),
    ...few.map((code) => drawChoice(column, code, counts.get(code), picked.has(code))));
  if (few.length < codes.length) {
    const more = el("button", { type: "button", className: "link", textContent: `all ${codes.length} values` });
    more.addEventListener("click", () => { shownAll.add(column.name); drawFacets(); });
    box.append(more);
  }
  return box;
}

const choiceName = (column, code) => (code < 0 ? "none" : column.names[code] === "" ? "(empty)" : column.names[code]);

function drawChoice(column, code, count, checked) {
  const input = el("input", { type: "checkbox", checked, value: String(code) });
  input.addEventListener("change", () => {
    const picked = pickedOf(column);
    if (input.checked) picked.add(code); else picked.delete(code);
    if (!picked.size) state.picks.delete(column);
    changed();
    const again = document.querySelector(`#facets [data-column="${CSS.escape(column.name)}"] input[value="${code}"]`);
    if (again) again.focus();
  });
  return el("label", { className: count ? "" : "zero" }, input,
    el("bdi", { dir: "auto", className: code < 0 ? "nothing" : "", textContent: choiceName(column, code) }),
    el("span", { className: "count", textContent: grouped(count) }));
}

function drawChips() {
  const chip = (words, drop) => {
    const button = el("button", { type: "button", title: "Remove this filter" },
      el("bdi", { textContent: words }), el("span", { textContent: " ✕" }));
    button.addEventListener("click", drop);
    return button;
  };
  const chips = [];
  for (const [column, range] of state.ranges) {
    const [low, high] = [range.low, range.high];
    const words = range.none ? `${column.label}: ${column === data.score ? "not scored" : "none"}`
      : low === null ? `${column.label} ≤ ${high}` : high === null ? `${column.label} ≥ ${low}` : `${column.label} ${low} to ${high}`;
    chips.push(chip(words, () => { state.ranges.delete(column); changed(); }));
  }
  for (const [column, codes] of state.picks) {
    const names = [...codes].map((code) => choiceName(column, code));
    chips.push(chip(`${column.name}: ${names.join(", ")}`, () => { state.picks.delete(column); changed(); }));
  }
  if (state.query) chips.push(chip(`“${state.query}”`, () => { $("search").value = ""; runSearch(""); }));
  if (chips.length > 1) chips.push(chip("clear all", clearAll));
  $("chips").replaceChildren(...chips);
  $("toggle").textContent = chips.length ? `Filters (${Math.max(1, chips.length - (chips.length > 1))})` : "Filters";
}

async function clearAll() {
  state.ranges.clear();
  state.picks.clear();
  $("search").value = "";
  await runSearch("");
}

async function runSearch(query) {
  state.query = query.trim();
  const done = await search(state.query, (share) => { $("count").textContent = `Searching… ${Math.round(100 * share)} %`; });
  if (!done) return;
  changed();
  if (state.row !== null) drawDetail();
}

async function jsonl() {
  const lines = [];
  for (const row of result.view) lines.push(`${JSON.stringify(await recordOf(row))}\n`);
  return lines;
}

async function download() {
  const button = $("download"), name = data.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").toLowerCase() || "records";
  button.disabled = true;
  try {
    const address = URL.createObjectURL(new Blob(await jsonl(), { type: "application/jsonl" }));
    el("a", { href: address, download: `${name}-${result.view.length}.jsonl` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  } finally { button.disabled = false; }
}

function startTools() {
  let timer = 0;
  $("search").addEventListener("focus", warm, { once: true });
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => runSearch($("search").value), 150); });
  $("sort").append(el("option", { value: "", textContent: "order of the file" }),
    ...data.columns.map((column) => el("option", { value: column.name, textContent: column.label })));
  $("sort").addEventListener("change", () => { state.sort = undefined; sortBy(data.byName.get($("sort").value) || null); });
  $("direction").addEventListener("click", () => { state.down = !state.down; changed(); });
  $("axis").append(...data.columns.filter((column) => column.kind === "number")
    .map((column) => el("option", { value: column.name, textContent: column.label })));
  $("toggle").addEventListener("click", () => {
    const open = document.body.classList.toggle("filtering");
    $("toggle").setAttribute("aria-expanded", String(open));
  });
  $("download").addEventListener("click", download);
  $("clear").addEventListener("click", clearAll);
  $("choose").addEventListener("toggle", drawChoose);
  document.addEventListener("click", (event) => { if (!$("choose").contains(event.target)) $("choose").open = false; });
}

function drawChoose() {
  const offered = data.columns.filter((column) => column.kind !== "text" || column.preview);
  $("choose").lastElementChild.replaceChildren(...offered.map((column) => {
    const input = el("input", { type: "checkbox", checked: shownColumns().includes(column) });
    input.addEventListener("change", () => {
      const shown = new Set(shownColumns());
      if (input.checked) shown.add(column); else shown.delete(column);
      const texts = (one) => one.kind === "text";
      state.shown = [...shown].filter((one) => !texts(one)).concat([...shown].filter(texts));
      drawHead();
      drawRows();
      writeHash();
    });
    return el("label", {}, input, el("bdi", { textContent: column.label }));
  }));
}

function onKey(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return void escape(event);
  if (event.target === $("search") && (event.key === "Enter" || event.key === "ArrowDown")) {
    event.preventDefault();
    $("list").focus();
    return move(placeOf(state.row) < 0 ? 0 : 1);
  }
  if (typing) return;
  if (event.key === "/") { event.preventDefault(); $("search").focus(); $("search").select(); return; }
  if (event.key === "Enter" && event.target.tagName !== "BUTTON" && event.target.tagName !== "SUMMARY") {
    if (state.row === null) move(0);
    document.body.classList.add("opened");
    return;
  }
  const page = Math.max(1, Math.floor($("list").clientHeight / rowHeight) - 2);
  const steps = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (!(event.key in steps) || (event.target.closest("#detail") && /Page|Home|End/.test(event.key))) return;
  event.preventDefault();
  move(steps[event.key]);
}

// Esc takes back one thing at a time: what was typed in the search, then the open record.
function escape(event) {
  if (event.target === $("search")) {
    if ($("search").value) { $("search").value = ""; runSearch(""); } else $("list").focus();
  } else if ($("choose").open) $("choose").open = false;
  else if (state.row !== null) choose(null);
  event.preventDefault();
}

function drawSummary() {
  const words = (value) => {
    if (typeof value === "number") return Number.isInteger(value) ? grouped(value) : String(Number(value.toPrecision(6)));
    if (typeof value === "boolean") return value ? "yes" : "no";
    return typeof value === "string" ? value : value === null ? "none" : JSON.stringify(value);
  };
  const isolated = (tag, text) => el(tag, {}, el("bdi", { textContent: text }));
  $("summary").replaceChildren(...data.summary.map(([name, value]) => el("div", {}, isolated("dt", name), isolated("dd", words(value)))));
}

async function restore() {
  readHash();
  $("search").value = state.query;
  await search(state.query, () => {});
  filterRows();
  if (state.row === null && result.view.length && matchMedia("(min-width: 1100px)").matches) state.row = result.view[0];
  else if (state.row !== null) document.body.classList.add("opened");
  draw();
  if (state.row !== null && placeOf(state.row) >= 0) bringIntoView(placeOf(state.row));
  drawRows();
  await drawDetail();
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot unpack the data; use one from 2023 or later");
  await loadHead();
  drawSummary();
  startTools();
  startPlot();
  startList();
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => { if (location.hash.slice(1) !== written) restore(); });
  await restore();
  document.body.dataset.ready = String(Math.round(performance.now())); // milliseconds from navigation to the first rows
}

start().catch((error) => {
  $("count").textContent = `The page could not be read: ${error.message}.`;
  $("count").className = "wrong";
  document.body.dataset.failed = error.message;
});
