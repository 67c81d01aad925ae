// One record: its texts, conversations as turns, changes as a word diff, and every other column. Text is only ever text.

let opening = 0;

async function drawDetail() {
  const pane = $("detail"), row = state.row, turn = ++opening;
  document.body.classList.toggle("with-detail", row !== null);
  if (row === null) { pane.hidden = true; pane.replaceChildren(); return; }
  const record = await recordOf(row);
  if (turn !== opening) return;
  const has = (column) => Object.hasOwn(record, column.name);
  const changes = data.pairs.filter(([before, after]) => typeof record[before] === "string" && typeof record[after] === "string");
  const inChange = new Set(changes.flat());
  const texts = [...data.shownTexts, ...data.texts.filter((column) => !data.shownTexts.includes(column))]
    .filter((column) => has(column) && !inChange.has(column.name) && record[column.name] !== null && record[column.name] !== "");
  const terms = termsOf(state.query);
  pane.hidden = false;
  pane.replaceChildren(detailHead(row), el("div", { className: "body" },
    ...texts.map((column) => section(column.name, drawValue(record[column.name], terms))),
    ...changes.map(([before, after]) => drawChange(before, after, record, terms)),
    drawSide(data.original.filter((column) => column.kind !== "text"), record)));
  pane.scrollTop = 0;
}

function detailHead(row) {
  const place = placeOf(row);
  const button = (text, title, act) => {
    const made = el("button", { type: "button", textContent: text, title, ariaLabel: title });
    made.addEventListener("click", act);
    return made;
  };
  const name = data.byName.get("id"), id = name && name.kind !== "text" ? valueOf(name, row) : null;
  const facts = ["status", "selected"].map((key) => data.byName.get(key))
    .filter((column) => column && column.kind === "category" && column.codes[row] >= 0);
  const words = (column) => (column.yesNo ? `${valueOf(column, row) ? "" : "not "}${column.name}` : String(valueOf(column, row)));
  const where = place < 0 ? "filtered out" : `${grouped(place + 1)} of ${grouped(result.view.length)}`;
  const pill = (column) => el("span", { className: column.yesNo && valueOf(column, row) ? "pill yes" : "pill", textContent: words(column) });
  const steps = [button("↑", "Previous record (↑)", () => move(-1)), button("↓", "Next record (↓)", () => move(1))];
  return el("header", {},
    button("✕", "Close (Esc)", () => choose(null)),
    el("div", { className: "which" },
      el("bdi", { className: "id", dir: "auto", textContent: id === null ? `record ${row}` : String(id) }),
      el("span", { className: "soft", textContent: where })),
    data.score ? el("span", { className: "big", title: data.score.name }, scoreMark(valueOf(data.score, row))) : null,
    ...facts.map(pill),
    el("span", { className: "steps" }, ...steps));
}

const section = (name, ...content) => el("section", {}, el("h2", {}, el("bdi", { textContent: name })), ...content);

const isTurn = (turn) => turn !== null && typeof turn === "object" && typeof (turn.value ?? turn.content) === "string"
  && typeof (turn.from ?? turn.role) === "string";
const isExchange = (turn) => Array.isArray(turn) && turn.length === 2 && turn.every((side) => typeof side === "string");

function drawValue(value, terms) {
  if (Array.isArray(value) && value.length && value.every(isTurn))
    return el("div", { className: "turns" }, ...value.map((turn) => drawTurn(turn.from ?? turn.role, turn.value ?? turn.content, terms)));
  if (Array.isArray(value) && value.length && value.every(isExchange)) { // a history of (user, assistant)
    const both = ([one, two]) => [drawTurn("user", one, terms), drawTurn("assistant", two, terms)];
    return el("div", { className: "turns" }, ...value.flatMap(both));
  }
  if (typeof value === "string") return el("div", { className: "words", dir: "auto" }, highlighted(value, terms));
  return el("pre", {}, highlighted(JSON.stringify(value, null, 2), terms));
}

function drawTurn(who, words, terms) {
  const ours = /^(gpt|assistant|bot|model|chatgpt|bard|bing)$/i.test(who);
  return el("div", { className: ours ? "turn answer" : "turn" }, el("bdi", { className: "who", textContent: who }),
    el("div", { className: "words", dir: "auto" }, highlighted(words, terms)));
}

function highlighted(words, terms) {
  const pieces = document.createDocumentFragment();
  if (!terms.length) { pieces.append(words); return pieces; }
  const pattern = new RegExp(terms.map((term) => term.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")).join("|"), "giu");
  let from = 0;
  for (const found of words.matchAll(pattern)) {
    pieces.append(words.slice(from, found.index), el("mark", { textContent: found[0] }));
    from = found.index + found[0].length;
  }
  pieces.append(words.slice(from));
  return pieces;
}

let changeView = "marked";

function drawChange(before, after, record, terms) {
  const title = before === "before" ? "before → after" : `${before} → ${after}`;
  const body = el("div"), tabs = el("div", { className: "tabs" });
  const show = (view) => {
    changeView = view;
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab.dataset.view === view));
    body.replaceChildren(...changeBody(view, before, after, record, terms));
  };
  for (const [view, text] of [["marked", "Marked"], ["beside", "Side by side"], ["before", "Before"], ["after", "After"]]) {
    const tab = el("button", { type: "button", textContent: text, dataset: { view } });
    tab.addEventListener("click", () => show(view));
    tabs.append(tab);
  }
  show(changeView);
  return section(title, tabs, body);
}

function changeBody(view, before, after, record, terms) {
  const [old, fresh] = [record[before], record[after]];
  if (view === "before" || view === "after") return [drawValue(view === "before" ? old : fresh, terms)];
  const pieces = wordDiff(old, fresh), compared = data.facts ? comparedFacts(old, fresh) : null;
  const marked = (text) => (compared ? withFacts(text, compared) : [text]);
  const words = (without) => el("div", { className: "words", dir: "auto" }, ...pieces.filter(({ kind }) => kind !== without)
    .flatMap(({ kind, text }) => (kind === "same" ? marked(text) : [el(kind === "old" ? "del" : "ins", {}, ...marked(text))])));
  if (old === fresh) return [el("p", { className: "soft", textContent: "Unchanged." }), words(null)];
  const line = compared ? [factLine(compared)] : [];
  return [...line, view === "marked" ? words(null) : el("div", { className: "beside" }, words("new"), words("old"))];
}

function drawSide(columns, record) {
  const rows = columns.filter((column) => Object.hasOwn(record, column.name)).map((column) => {
    const value = record[column.name];
    const none = column === data.score ? "not scored" : "none";
    const words = value === null ? el("span", { className: "nothing", textContent: none })
      : column.yesNo ? (value ? "yes" : "no")
      : column.kind === "number" ? el("bdi", { textContent: formatted(value, column.whole), title: String(value) })
      : el("bdi", { textContent: String(value) });
    return el("tr", {}, el("th", { scope: "row" }, el("bdi", { textContent: column.name })), el("td", {}, words));
  });
  return rows.length ? section("columns", el("table", {}, el("tbody", {}, ...rows))) : null;
}
