// The list: only the rows in sight exist in the page.

const WIDTHS = { number: 92, category: 112, label: 120 };
let rowHeight = 34, offered = [];

// What the list shows before anyone chooses: the score, what was selected, why not, and the texts' beginnings.
function usualColumns() {
  const [first, last] = [data.previews[0], data.previews[data.previews.length - 1]];
  const wide = $("list").clientWidth;
  const notes = data.original.filter((column) => column.kind === "category" && (column.name === "status" || column.name === "selected")
    && column.values.length > 1);
  const texts = first === last || wide < 820 ? [first] : [first, last];
  const shown = [data.score, ...notes, ...texts].filter(Boolean);
  const others = data.original.filter((column) => column.kind !== "text" && !shown.includes(column));
  return data.previews.length ? shown : [...shown, ...others.slice(0, 6)];
}

const shownColumns = () => (state.shown && state.shown.length ? state.shown : usualColumns());

function drawHead() {
  offered = shownColumns();
  const wide = (column) => Math.max(WIDTHS[column.kind], column.label.length * 7 + 34);
  const track = (column) => (column.kind === "text" ? "minmax(180px, 1fr)" : `${wide(column)}px`);
  $("list").style.setProperty("--tracks", offered.map(track).join(" "));
  $("columns").replaceChildren(...offered.map((column) => {
    const sortedBy = state.sort === column;
    const button = el("button", { type: "button", className: column.kind, title: `Sort by ${column.label}` },
      column.label, el("span", { className: "arrow", textContent: sortedBy ? (state.down ? "↓" : "↑") : "" }));
    button.addEventListener("click", () => sortBy(column));
    const head = el("div", {}, button);
    head.setAttribute("role", "columnheader");
    head.setAttribute("aria-sort", sortedBy ? (state.down ? "descending" : "ascending") : "none");
    return head;
  }));
}

function sortBy(column) {
  if (state.sort === column) state.down = !state.down;
  else [state.sort, state.down] = [column, column !== null && column.kind === "number"];
  if (column === null) state.down = true;
  changed();
}

function drawList() {
  rowHeight = parseFloat(getComputedStyle($("list")).getPropertyValue("--row")) || 34;
  $("space").style.height = `${result.view.length * rowHeight}px`;
  $("list").setAttribute("aria-rowcount", result.view.length + 1);
  $("empty").hidden = result.view.length > 0;
  drawRows();
}

function drawRows() {
  const list = $("list"), above = Math.max(0, list.scrollTop - 2 * rowHeight);
  const first = Math.min(Math.max(0, Math.floor(above / rowHeight)), Math.max(0, result.view.length - 1));
  const last = Math.min(result.view.length, first + Math.ceil(list.clientHeight / rowHeight) + 5);
  $("rows").style.transform = `translateY(${first * rowHeight}px)`;
  const rows = [];
  for (let place = first; place < last; place++) rows.push(drawRow(result.view[place], place));
  $("rows").replaceChildren(...rows);
  const active = document.getElementById(`row-${state.row}`);
  if (active) list.setAttribute("aria-activedescendant", active.id);
  else list.removeAttribute("aria-activedescendant");
}

function drawRow(row, place) {
  const element = el("div", { className: row === state.row ? "row active" : "row", id: `row-${row}`, dataset: { row } },
    ...offered.map((column) => drawCell(column, row)));
  element.setAttribute("role", "row");
  element.setAttribute("aria-rowindex", place + 2);
  element.setAttribute("aria-selected", String(row === state.row));
  return element;
}

function drawCell(column, row) {
  const cell = el("div", { className: `cell ${column.kind}` });
  cell.setAttribute("role", "gridcell");
  if (column.kind === "text") {
    const words = column.preview ? column.preview[row] : `${grouped(column.length[row] ?? 0)} characters`;
    cell.append(el("bdi", { dir: "auto", textContent: words }));
    return cell;
  }
  const value = valueOf(column, row);
  if (column === data.score) {
    cell.classList.add("score");
    cell.append(scoreMark(value));
  } else if (value === null) cell.append(el("span", { className: "nothing", textContent: "–" }));
  else if (column.kind === "number") cell.append(formatted(value, column.whole));
  else cell.append(mark(column, value));
  return cell;
}

const scoreMark = (value) => (value === null ? el("span", { className: "nothing", textContent: "not scored" })
  : el("span", { textContent: formatted(value, data.score.whole) }));

function mark(column, value) {
  if (column.yesNo) return el("span", { className: value ? "pill yes" : "nothing", textContent: value ? "yes" : "no" });
  const words = String(value) === "" ? "(empty)" : String(value);
  const bad = column.name === "status" && /fail|error|bad|reject/i.test(words);
  const className = column.kind !== "category" ? "label" : bad ? "pill bad" : "pill";
  return el("bdi", { className, dir: "auto", textContent: words, title: words });
}

function placeOf(row) { return row === null ? -1 : result.view.indexOf(row); }

function bringIntoView(place) {
  const list = $("list"), top = place * rowHeight, head = $("columns").offsetHeight;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + rowHeight > list.scrollTop + list.clientHeight - head) list.scrollTop = top + rowHeight - list.clientHeight + head;
}

// Move the chosen record by `step` places of the list.
function move(step) {
  if (!result.view.length) return;
  const place = placeOf(state.row);
  const next = place < 0 ? 0 : Math.max(0, Math.min(result.view.length - 1, place + step));
  bringIntoView(next);
  choose(result.view[next]);
}

function startList() {
  const list = $("list");
  let waiting = false;
  list.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; drawRows(); });
  }, { passive: true });
  $("rows").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row && !String(getSelection())) choose(Number(row.dataset.row), true);
  });
  new ResizeObserver(() => { drawHead(); drawList(); }).observe(list);
}
