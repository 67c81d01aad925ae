// Numbers, links and names (capitalised words inside sentences) of a text, and what a change did with them. The number that
// begins a line of a list ("1. ...", "2) ...") is none.

const FACTS = /https?:\/\/[^\s)>\]]+|(?<!\d)(?!(?<=^[ \t]*)\d{1,3}[.)]\s)(?:\d[\d,.]*\d|\d)|(?<=[a-z,;] )\p{Lu}[\p{L}\p{N}_-]+/gmu;
const factKey = (found) => (/^\d/.test(found) ? found.replaceAll(",", "") : found);
const factsOf = (text) => new Set([...text.matchAll(FACTS)].map((found) => factKey(found[0])));

// {kept, lost, fresh}: facts of both texts, of `before` alone, of `after` alone. A name may begin a sentence in the other.
function comparedFacts(before, after) {
  const [old, now] = [factsOf(before), factsOf(after)];
  const within = (fact, facts, text) => facts.has(fact) || (!/^\d/.test(fact) && text.includes(fact));
  const kept = new Set([...old].filter((fact) => within(fact, now, after)));
  const lost = new Set([...old].filter((fact) => !kept.has(fact)));
  const fresh = new Set([...now].filter((fact) => !within(fact, old, before)));
  for (const fact of now) if (!fresh.has(fact)) kept.add(fact);
  return { kept, lost, fresh };
}

// `text` as nodes, its facts marked.
function withFacts(text, compared) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(FACTS)) {
    const key = factKey(found[0]), kind = ["kept", "lost", "fresh"].find((name) => compared[name].has(key));
    if (!kind) continue;
    nodes.push(text.slice(from, found.index), el("span", { className: `fact ${kind}`, textContent: found[0], title: `${kind === "fresh" ? "new" : kind}: ${key}` }));
    from = found.index + found[0].length;
  }
  return [...nodes, text.slice(from)];
}

function factLine(compared) {
  const some = (facts) => [...facts].slice(0, 12).join(", ") + (facts.size > 12 ? ", …" : "");
  const parts = [["kept", "kept"], ["lost", "lost"], ["fresh", "new"]].filter(([name]) => compared[name].size)
    .map(([name, word]) => el("span", { className: `fact ${name}`, textContent: name === "kept" ? `${compared.kept.size} kept` : `${word}: ${some(compared[name])}` }));
  return el("p", { className: "facts" }, "numbers, links and names: ", ...(parts.length ? parts : ["none"]));
}
