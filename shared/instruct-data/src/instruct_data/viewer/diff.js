// A word diff: the shortest script of kept, deleted and inserted words (Myers, "An O(ND) difference algorithm", 1986).

// Links, numbers with their signs, words, single CJK characters (which have no spaces between them), runs of space, and any
// other character by itself.
const WORDS = /\s+|https?:\/\/[^\s)>\]]+|\d[\d,.]*\d|[\p{sc=Han}\p{sc=Hira}\p{sc=Kana}]|(?:(?![\p{sc=Han}\p{sc=Hira}\p{sc=Kana}])[\p{L}\p{M}\p{N}_])+|[^]/gu;
const MOST_EDITS = 2500; // beyond it the texts have too little in common to show word by word

// [{kind: "same" | "old" | "new", text}]: "same" and "old" together are `before`, "same" and "new" are `after`.
function wordDiff(before, after) {
  const a = before.match(WORDS) || [], b = after.match(WORDS) || [];
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const middle = shortest(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const same = (words) => words.map((text) => ({ kind: "same", text }));
  return joined([...same(a.slice(0, start)), ...middle, ...same(a.slice(a.length - end))]);
}

function shortest(a, b) {
  if (!a.length || !b.length) return whole(a, b);
  const most = Math.min(a.length + b.length, MOST_EDITS), trace = [];
  let reach = new Int32Array(2 * most + 3);
  for (let edits = 0; edits <= most; edits++) {
    trace.push(reach.slice(most - edits, most + edits + 3)); // diagonals -edits-1 ... edits+1 as they were before
    for (let k = -edits; k <= edits; k += 2) {
      const down = k === -edits || (k !== edits && reach[most + k] < reach[most + k + 2]);
      let x = down ? reach[most + k + 2] : reach[most + k] + 1, y = x - k;
      while (x < a.length && y < b.length && a[x] === b[y]) { x++; y++; }
      reach[most + k + 1] = x;
      if (x >= a.length && y >= b.length) return walked(a, b, trace);
    }
  }
  return whole(a, b);
}

const whole = (a, b) => [...a.map((text) => ({ kind: "old", text })), ...b.map((text) => ({ kind: "new", text }))];

// From the end of both texts back to the start, along the furthest reaching paths.
function walked(a, b, trace) {
  const edits = [];
  let x = a.length, y = b.length;
  for (let depth = trace.length - 1; depth >= 0; depth--) {
    const reach = (k) => trace[depth][k + depth + 1], k = x - y;
    const down = k === -depth || (k !== depth && reach(k - 1) < reach(k + 1));
    const last = depth === 0 ? 0 : down ? reach(k + 1) : reach(k - 1); // x before this depth's one edit
    const start = depth === 0 || down ? last : last + 1; // x after it: from here on words are the same
    for (; x > start; x--, y--) edits.push({ kind: "same", text: a[x - 1] });
    if (depth === 0) break;
    if (down) edits.push({ kind: "new", text: b[--y] });
    else edits.push({ kind: "old", text: a[--x] });
  }
  return edits.reverse();
}

// Neighbours of one kind as one piece; a lone space between two changes is part of the change, old before new.
function joined(edits) {
  const pieces = [];
  let old = "", fresh = "";
  const flush = () => {
    if (old) pieces.push({ kind: "old", text: old });
    if (fresh) pieces.push({ kind: "new", text: fresh });
    old = fresh = "";
  };
  edits.forEach(({ kind, text }, index) => {
    if (kind === "old") old += text;
    else if (kind === "new") fresh += text;
    else if (old && fresh && /^\s+$/.test(text) && index + 1 < edits.length && edits[index + 1].kind !== "same") {
      old += text;
      fresh += text;
    } else {
      flush();
      if (pieces.length && pieces[pieces.length - 1].kind === "same") pieces[pieces.length - 1].text += text;
      else pieces.push({ kind: "same", text });
    }
  });
  flush();
  return pieces;
}
