// The histogram: all rows pale, those that pass the other filters dark; dragging over it sets the range.

const BINS = 44, PLOT = { width: 264, height: 116, foot: 18 };
const extents = new Map();

// The middle 99 % where a few far values would leave everything else in one bar; the end bars then hold the rest.
function extentOf(column) {
  if (!extents.has(column.name)) extents.set(column.name, measured(column));
  return extents.get(column.name);
}

function measured({ numbers: values, least, greatest, whole }) {
  if (!(least <= greatest)) return null;
  const there = values.filter((value) => !Number.isNaN(value)).sort();
  const at = (share) => there[Math.min(there.length - 1, Math.floor(share * there.length))];
  const spread = at(0.995) - at(0.005);
  let [low, high] = [least, greatest];
  if (spread > 0 && least < at(0.005) - spread) low = at(0.005);
  if (spread > 0 && greatest > at(0.995) + spread) high = at(0.995);
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  let bins = BINS;
  if (whole && high - low < BINS) [low, high, bins] = [low - 0.5, high + 0.5, Math.round(high - low) + 1];
  return { low, high, bins, cutLow: least < low, cutHigh: greatest > high };
}

function binned(column, extent) {
  const all = new Uint32Array(extent.bins), some = new Uint32Array(extent.bins);
  const passes = passesOthers(column), width = (extent.high - extent.low) / extent.bins;
  for (let row = 0; row < data.rows; row++) {
    const value = column.numbers[row];
    if (Number.isNaN(value)) continue;
    const bin = Math.max(0, Math.min(extent.bins - 1, Math.floor((value - extent.low) / width)));
    all[bin]++;
    if (passes(row)) some[bin]++;
  }
  return { all, some };
}

const shape = (tag, attributes, text) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
};

function drawPlot() {
  const column = state.axis, svg = document.querySelector("#plot svg");
  $("plot").hidden = !column;
  if (!column) return;
  const extent = extentOf(column), { width, height, foot } = PLOT;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  if (extent) {
    const { all, some } = binned(column, extent), most = Math.max(...all), step = width / extent.bins;
    const bar = (kind, bin, count) => {
      const tall = count ? Math.max(1.5, (count / most) * (height - foot - 4)) : 0;
      const place = { x: bin * step + 0.4, width: Math.max(0.5, step - 0.8), y: height - foot - tall, height: tall };
      svg.append(shape("rect", { class: kind, ...place }));
    };
    all.forEach((count, bin) => bar("all", bin, count));
    some.forEach((count, bin) => bar("some", bin, count));
    drawTicks(svg, column, extent);
    drawRange(svg, column, extent);
    svg.onpointermove = (event) => describeBar(event, column, extent, all, some);
  }
  $("bar").textContent = extent ? plotNote(column, extent) : "No record has a value here.";
  fillRange(column);
}

function drawTicks(svg, column, extent) {
  const { width, height, foot } = PLOT, span = extent.high - extent.low;
  svg.append(shape("line", { class: "base", x1: 0, x2: width, y1: height - foot + 0.5, y2: height - foot + 0.5 }));
  const raw = span / 4, power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  if (column.whole) step = Math.max(1, step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  for (let tick = Math.ceil(extent.low / step) * step; tick <= extent.high; tick += step) {
    const x = ((tick - extent.low) / span) * width;
    if (x < 10 || x > width - 10) continue;
    const text = Math.abs(tick) >= 1e6 || (digits > 5) ? tick.toExponential(1) : tick.toFixed(Math.min(digits, 5));
    svg.append(shape("line", { class: "base", x1: x, x2: x, y1: height - foot, y2: height - foot + 4 }));
    svg.append(shape("text", { x, y: height - 3, "text-anchor": "middle" }, text));
  }
}

function drawRange(svg, column, extent) {
  const range = state.ranges.get(column);
  if (!range || range.none) return;
  const place = (value) => Math.max(0, Math.min(1, (value - extent.low) / (extent.high - extent.low))) * PLOT.width;
  const from = range.low === null ? 0 : place(range.low), to = range.high === null ? PLOT.width : place(range.high);
  svg.append(shape("rect", { class: "brush", x: from, width: Math.max(1, to - from), y: 0, height: PLOT.height - PLOT.foot }));
}

function plotNote(column, extent) {
  const ends = [extent.cutLow && "first", extent.cutHigh && "last"].filter(Boolean).join(" and ");
  if (!ends) return "Drag over the bars to choose a range.";
  const beyond = [extent.cutLow && `down to ${formatted(column.least, column.whole)}`,
    extent.cutHigh && `up to ${formatted(column.greatest, column.whole)}`].filter(Boolean).join(" and ");
  return `The ${ends} bar holds all beyond, ${beyond}.`;
}

const shareAt = (event, svg) => {
  const box = svg.getBoundingClientRect();
  return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
};

function describeBar(event, column, extent, all, some) {
  const bin = Math.min(extent.bins - 1, Math.floor(shareAt(event, event.currentTarget) * extent.bins));
  const width = (extent.high - extent.low) / extent.bins, from = extent.low + bin * width;
  const ends = column.whole && width === 1 ? String(Math.round(from + 0.5)) : `${formatted(from)} to ${formatted(from + width)}`;
  const counts = some[bin] === all[bin] ? grouped(all[bin]) : `${grouped(some[bin])} of ${grouped(all[bin])}`;
  $("bar").textContent = `${ends}: ${counts}`;
}

function fillRange(column) {
  const range = state.ranges.get(column);
  for (const [id, end] of [["low", "low"], ["high", "high"]])
    if (document.activeElement !== $(id)) $(id).value = range && range[end] !== null ? range[end] : "";
  $("none").hidden = !column.none;
  $("none").textContent = `${grouped(column.none)} ${column === data.score ? "not scored" : "without"}`;
  $("none").setAttribute("aria-pressed", String(Boolean(range && range.none)));
}

function setRange(column, low, high, none = false) {
  if (low !== null && high !== null && low > high) [low, high] = [high, low];
  if (low === null && high === null && !none) state.ranges.delete(column);
  else state.ranges.set(column, { low, high, none });
  changed();
}

// Whole bars are chosen; a range that reaches the first or last bar is open there, since that bar may hold all beyond.
function brushed(column, one, two) {
  const extent = extentOf(column), width = (extent.high - extent.low) / extent.bins;
  const first = Math.floor(Math.min(one, two) * extent.bins), last = Math.ceil(Math.max(one, two) * extent.bins);
  const round = (value) => Number(value.toPrecision(6));
  const low = first <= 0 ? null : round(extent.low + first * width);
  const high = last >= extent.bins ? null : round(extent.low + last * width);
  setRange(column, low, high);
}

function startPlot() {
  const svg = document.querySelector("#plot svg");
  let from = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !extentOf(state.axis)) return;
    from = shareAt(event, svg);
    svg.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  svg.addEventListener("pointermove", (event) => {
    if (from !== null && Math.abs(shareAt(event, svg) - from) > 0.01) brushed(state.axis, from, shareAt(event, svg));
  });
  svg.addEventListener("pointerup", (event) => {
    if (from !== null && Math.abs(shareAt(event, svg) - from) <= 0.01) setRange(state.axis, null, null);
    from = null;
  });
  svg.addEventListener("pointercancel", () => { from = null; });
  svg.addEventListener("pointerleave", () => {
    if (extentOf(state.axis)) $("bar").textContent = plotNote(state.axis, extentOf(state.axis));
  });
  const typed = (id) => ($(id).value === "" ? null : Number($(id).value));
  for (const id of ["low", "high"]) $(id).addEventListener("change", () => setRange(state.axis, typed("low"), typed("high")));
  $("none").addEventListener("click", () => {
    const range = state.ranges.get(state.axis);
    setRange(state.axis, null, null, !(range && range.none));
  });
  $("axis").addEventListener("change", () => { state.axis = data.byName.get($("axis").value); changed(); });
}
