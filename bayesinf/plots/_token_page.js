
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const floats = (text) => (text ? new Float32Array(bytes(text).buffer) : null);
  const expand = (runs) => runs.flatMap(([first, length]) =>
    Array.from({ length }, (_, k) => first + k));

  const WHOLE = 0;
  const sequences = data.train.length;
  const methods = data.methods.map((m) =>
    ({ ...m, sums: floats(m.sums), sumErrors: floats(m.sum_errors) }));
  const state = { method: methods[0], pinned: WHOLE, preview: null, order: "helpful", search: "" };
  const shownRow = () => state.preview ?? state.pinned;

  // ---- numbers -------------------------------------------------------------------------------

  const minus = (text) => text.replaceAll("-", "−");
  const count = (n) => n.toLocaleString("en");
  function number(value, digits = 3) {
    const size = Math.abs(value);
    if (size === 0) return "0";
    const long = size < 1e-3 || size >= 10 ** Math.max(digits, 3);
    return minus(long ? value.toExponential(digits - 1) : value.toPrecision(digits));
  }
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const side = (value) => (value < 0 ? "helpful" : value > 0 ? "harmful" : "");
  const interval = (half, bound) => `± ${bound ? "at most " : ""}${number(half, 2)}`;

  // One value a training token: NaN where the row does not keep it.
  function unpack(method, r) {
    const packed = method.rows[r];
    const kept = new Int8Array(bytes(packed.values).buffer);
    const halves = packed.errors ? bytes(packed.errors) : null;
    const row = {
      largest: 127 * packed.scale, below: packed.below, kept: kept.length,
      values: new Float32Array(spans.length).fill(NaN),
      errors: halves && new Float32Array(spans.length),
      bound: method.token_bound?.[r],
    };
    const gaps = packed.gaps ? bytes(packed.gaps) : null;
    let n = -1, g = 0;
    for (let k = 0; k < kept.length; k++) {
      if (gaps) {
        for (; gaps[g] === 255; g++) n += 254;
        n += gaps[g++];
      } else n++;
      row.values[n] = packed.scale * kept[k];
      if (halves) row.errors[n] = packed.error_scale * halves[k];
    }
    return row;
  }

  // ---- text ----------------------------------------------------------------------------------

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const UNSEEN = /[\u0000-\u001f\u007f]/;
  const sign = (c) => ({ "\n": "↵", "\t": "⇥", "\u007f": "␡" })[c] ??
    String.fromCharCode(0x2400 + c.charCodeAt(0));

  // Text of a token into its element; characters that cannot be seen get a sign.
  function write(element, piece) {
    if (piece && !UNSEEN.test(piece)) {
      element.textContent = piece;
      return;
    }
    if (!piece) element.append(make("i", "", "∅"));
    for (const c of piece) {
      if (!UNSEEN.test(c)) element.append(c);
      else element.append(make("i", "", sign(c)));
    }
  }
  const quoted = (piece) => `“${[...piece].map((c) => (UNSEEN.test(c) ? sign(c) : c)).join("")}”`;

  // Elements of a passage's pieces; `visit` sees those that have a score.
  function fill(parent, passage, visit) {
    const positions = expand(passage.positions), scored = expand(passage.scored);
    let next = 0;
    passage.pieces.forEach((piece, k) => {
      if (k && positions[k] !== positions[k - 1] + 1) parent.append(make("i", "", " ⋯ "));
      const span = make("span", "t");
      write(span, piece);
      span.token = { passage, piece, position: positions[k], n: -1 };
      if (scored[next] === k) {
        next++;
        visit(span);
      } else span.classList.add("blank");
      parent.append(span);
    });
  }

  // ---- building ------------------------------------------------------------------------------

  const spans = [], items = [], queryTokens = [];

  function buildQuery() {
    fill(byId("query"), data.query, (span) => {
      span.token.n = queryTokens.push(span);
      span.setAttribute("role", "button");
      span.tabIndex = queryTokens.length === 1 ? 0 : -1;
      span.setAttribute("aria-label",
        `token at position ${span.token.position}: ${quoted(span.token.piece)}`);
    });
    if (!data.query.pieces.length) {
      byId("query").append(make("i", "", `query ${data.query.id} (its text was not given)`));
    }
  }

  function buildList() {
    const all = document.createDocumentFragment();
    for (const passage of data.train) {
      const item = make("li"), text = make("div", "text"), about = make("div", "about");
      const parts = {
        number: make("p", "number"), bar: make("div", "bar"), fill: make("b"), error: make("u"),
      };
      parts.bar.setAttribute("aria-hidden", "true");
      parts.bar.append(parts.fill, parts.error);
      about.append(make("p", "id", passage.id), parts.number, parts.bar);
      text.dir = "auto";
      text.tabIndex = -1;
      text.setAttribute("role", "group");
      text.setAttribute("aria-label", `training sequence ${passage.id}`);
      const first = spans.length;
      fill(text, passage, (span) => { span.token.n = spans.push(span) - 1; });
      item.dataset.id = passage.id;
      item.append(about, text);
      all.append(item);
      items.push({
        item, text, ...parts, first, last: spans.length,
        words: `${passage.id}\n${passage.pieces.join("")}`.toLowerCase(),
      });
    }
    byId("list").append(all);
  }

  function buildControls() {
    methods.forEach((method, k) => {
      const label = make("label"), input = make("input");
      Object.assign(input, { type: "radio", name: "method", value: method.name, checked: !k });
      label.append(input, make("span", "", method.name));
      input.addEventListener("change", () => { state.method = method; render(); });
      byId("methods").append(label);
    });
  }

  function buildNotes() {
    const percent = Math.round(100 * data.confidence);
    const some = methods.some((m) => m.rows.some((row) => row.gaps));
    const bounds = methods.some((m) => m.sum_bound?.includes(true) || m.token_bound?.includes(true));
    const notes = [
      "Negative values (blue) are helpful: more of that token in training lowers the query's loss. " +
        "Positive values (orange) are harmful. Values are as the method gave them.",
      "The underline of a query token shows how strong its strongest training token is, beside the " +
        "other query tokens.",
      "Colours run to the largest absolute value of the method and query token shown, as methods " +
        "have scales of their own; so do the bars. Compare methods by pattern and order, not by colour.",
      "A sequence stands by the sum of its tokens' values. These sums are exact; single tokens are " +
        "rounded to 1/127 of the largest.",
    ];
    if (some) {
      notes.push("For each query token the page holds the strongest training tokens only, as many " +
        "as keep it small; the others are left blank. The whole query's colours are complete.");
    }
    if (methods.some((m) => m.sumErrors)) {
      notes.push(`Whiskers and “±” are ${percent} % intervals of Monte-Carlo error, one at a time: ` +
        "of many intervals some miss. A bar is pale where its interval contains 0.");
    }
    if (bounds) {
      notes.push("“At most” and a dashed whisker: the error of this sum is not known, only that it " +
        "is no larger than its tokens' errors together; it may be far smaller.");
    }
    if (methods.some((m) => !m.sumErrors)) {
      notes.push(`No error is known for ${methods.filter((m) => !m.sumErrors)
        .map((m) => m.name).join(", ")}.`);
    }
    for (const m of methods.filter((m) => m.estimand !== "influence")) {
      notes.push(`${m.name} is a similarity: only its order means something.`);
    }
    if (data.available > sequences) {
      notes.push(`Of ${count(data.available)} training sequences the page shows the ` +
        `${count(sequences)} with the largest influence on the query or one of its tokens.`);
    }
    byId("notes").append(...notes.map((text) => make("li", "", text)));
    document.title = `Token influence: ${data.query.id}`;
    byId("summary").textContent = `Query ${data.query.id} beside ${count(sequences)} training ` +
      `sequences, ${count(spans.length)} tokens in all. Point at a query token; click to pin it.`;
  }

  // ---- drawing -------------------------------------------------------------------------------

  let row, coloured = [];

  function colour() {
    for (const span of coloured) span.style.backgroundColor = "";
    coloured = [];
    row.values.forEach((value, n) => {
      const share = Math.abs(value) / row.largest;
      if (!(share > 0.02)) return;  // too faint to see
      const name = value < 0 ? "helpful" : "harmful";
      spans[n].style.backgroundColor = `rgb(var(--${name}) / ${share.toFixed(3)})`;
      coloured.push(spans[n]);
    });
  }

  function drawSums() {
    const r = shownRow(), { sums, sumErrors } = state.method, at = r * sequences;
    const bound = state.method.sum_bound?.[r];
    let largest = 0, reach = 0;
    for (let s = 0; s < sequences; s++) {
      largest = Math.max(largest, Math.abs(sums[at + s]));
      reach = Math.max(reach, Math.abs(sums[at + s]) + (sumErrors?.[at + s] ?? 0));
    }
    const limit = 1.04 * (Math.min(reach, 2 * largest) || 1);
    const percent = (value) => 50 + 50 * Math.max(-1, Math.min(1, value / limit));
    items.forEach((entry, s) => {
      const value = sums[at + s], half = sumErrors?.[at + s];
      entry.value = value;
      entry.item.className = side(value) + (half >= Math.abs(value) ? " unsure" : "");
      entry.number.replaceChildren(signed(value));
      if (half !== undefined) entry.number.append(make("small", "", ` ${interval(half, bound)}`));
      const ends = [percent(Math.min(0, value)), percent(Math.max(0, value))];
      entry.fill.style.left = `${ends[0]}%`;
      entry.fill.style.width = `${ends[1] - ends[0]}%`;
      entry.error.hidden = half === undefined;
      if (half === undefined) return;
      entry.error.className = bound ? "bound" : "";
      entry.error.style.left = `${percent(value - half)}%`;
      entry.error.style.width = `${percent(value + half) - percent(value - half)}%`;
    });
  }

  let inOrder = [];

  function arrange() {
    const way = state.order === "helpful" ? 1 : -1;
    const wanted = state.search.toLowerCase();
    const sorted = [...items].sort((a, b) => way * (a.value - b.value));
    if (sorted.some((entry, k) => entry !== inOrder[k])) {
      byId("list").append(...sorted.map((entry) => entry.item));
      inOrder = sorted;
    }
    let found = 0;
    for (const entry of items) {
      entry.item.hidden = !entry.words.includes(wanted);
      found += !entry.item.hidden;
    }
    const tab = sorted.find((entry) => !entry.item.hidden);
    for (const entry of items) entry.text.tabIndex = entry === tab ? 0 : -1;
    const what = wanted ? `${count(found)} of ${count(sequences)} sequences contain “${state.search}”`
      : `${count(sequences)} training sequences, most ${state.order} first`;
    const blank = row.kept < spans.length
      ? `. Coloured: the ${count(row.kept)} strongest of ${count(spans.length)} tokens; those below ` +
        `${(row.below / (row.largest || 1)).toPrecision(2)} of the largest are left blank` : "";
    byId("count").textContent = `${what}${blank}.`;
  }

  function drawState() {
    const r = shownRow(), token = queryTokens[r - 1]?.token;
    const scales = state.method.rows.slice(1).map((packed) => packed.scale);
    const strongest = Math.max(...scales) || 1;
    queryTokens.forEach((span, k) => {
      span.style.setProperty("--strength", (scales[k] / strongest).toFixed(2));
      span.classList.toggle("shown", k + 1 === r);
      span.setAttribute("aria-pressed", String(k + 1 === state.pinned));
    });
    const note = token ? `position ${token.position}${r === state.pinned ? ", pinned" : ""}`
      : queryTokens.length ? `the sum over its ${count(queryTokens.length)} scored tokens` : "";
    byId("shown").replaceChildren(token ? quoted(token.piece) : "Whole query",
      make("small", "", ` ${note}`));
    byId("release").hidden = state.pinned === WHOLE;
    byId("low").textContent = `helpful ${number(-row.largest)}`;
    byId("high").textContent = `${signed(row.largest)} harmful`;
    byId("legend").setAttribute("aria-label",
      `Colours: blue, helpful, to ${number(-row.largest)}; orange, harmful, to ${number(row.largest)}`);
  }

  function render() {
    hideTip();
    row = unpack(state.method, shownRow());
    colour();
    drawSums();
    arrange();
    drawState();
  }

  // ---- the query -----------------------------------------------------------------------------

  function preview(r) {
    if (state.preview === r) return;
    const before = shownRow();
    state.preview = r;
    if (shownRow() !== before) render();
  }
  function pin(r) {
    state.pinned = state.pinned === r ? WHOLE : r;
    render();
  }
  function release() {
    state.pinned = WHOLE;
    state.preview = null;
    render();
  }
  function focusQuery(k) {
    const span = queryTokens[Math.max(0, Math.min(queryTokens.length - 1, k))];
    for (const other of queryTokens) other.tabIndex = other === span ? 0 : -1;
    span.focus();
    preview(span.token.n);
  }
  const STEPS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  const queryToken = (event) => {
    const span = event.target.closest(".t");
    return span && span.token.n > 0 ? span : null;
  };

  function listenQuery() {
    const box = byId("query");
    box.addEventListener("pointerover", (event) => {
      const span = queryToken(event);
      if (span && event.pointerType !== "touch") preview(span.token.n);
    });
    box.addEventListener("pointerleave", () => preview(null));
    box.addEventListener("click", (event) => {
      const span = queryToken(event);
      if (span) pin(span.token.n);
    });
    box.addEventListener("focusin", (event) => {
      const span = queryToken(event);
      if (span && span.matches(":focus-visible")) preview(span.token.n);
    });
    box.addEventListener("focusout", () => preview(null));
    box.addEventListener("keydown", (event) => {
      const span = queryToken(event);
      if (!span) return;
      const k = span.token.n - 1;
      if (event.key in STEPS) focusQuery(k + STEPS[event.key]);
      else if (event.key === "Home") focusQuery(0);
      else if (event.key === "End") focusQuery(queryTokens.length - 1);
      else if (event.key === "Enter" || event.key === " ") pin(k + 1);
      else return;
      event.preventDefault();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && event.target.type !== "search") release();
    });
    byId("release").addEventListener("click", release);
  }

  // ---- the training tokens -------------------------------------------------------------------

  const tip = byId("tip");
  let at = null;

  function showTip(span) {
    hideTip();
    at = span;
    at.classList.add("at");
    const { passage, piece, position, n } = span.token, value = row.values[n];
    tip.replaceChildren(`${quoted(piece)}  position ${position} of ${passage.id}\n`);
    if (n < 0) tip.append("no score: the first token, or masked");
    else if (Number.isNaN(value)) tip.append(`left blank: below ${number(row.below)} in size`);
    else {
      const share = Math.round((100 * Math.abs(value)) / (row.largest || 1));
      tip.append(make("strong", "", signed(value)),
        row.errors ? ` ${interval(row.errors[n], row.bound)}` : "",
        `  ${side(value)}, ${share} % of the largest`);
    }
    tip.hidden = false;
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - own.width - 8);
    const under = box.bottom + 6 + own.height < innerHeight;
    const top = under ? box.bottom + 6 : box.top - own.height - 6;
    tip.style.transform = `translate(${Math.max(8, left)}px, ${top}px)`;
  }
  function hideTip() {
    tip.hidden = true;
    at?.classList.remove("at");
    at = null;
  }

  function moveToSequence(from, step) {
    const open = inOrder.filter((entry) => !entry.item.hidden);
    const to = open[open.findIndex((entry) => entry.text === from) + step];
    if (!to) return;
    from.tabIndex = -1;
    to.text.tabIndex = 0;
    to.text.focus();
  }

  function strongest(entry) {
    let best = spans[entry.first];
    for (let n = entry.first; n < entry.last; n++) {
      if (Math.abs(row.values[n]) > Math.abs(row.values[best.token.n] || 0)) best = spans[n];
    }
    return best;
  }

  function listenList() {
    const list = byId("list");
    const entryOf = (element) => items.find((entry) => entry.text === element);
    const onToken = (event) => {
      const span = event.target.closest(".t");
      if (span) showTip(span);
      else hideTip();
    };
    list.addEventListener("pointerover", onToken);
    list.addEventListener("click", onToken);
    list.addEventListener("pointerleave", hideTip);
    list.addEventListener("focusin", (event) => {
      const entry = entryOf(event.target);
      if (entry && event.target.matches(":focus-visible")) showTip(strongest(entry));
    });
    list.addEventListener("focusout", hideTip);
    list.addEventListener("keydown", (event) => {
      const entry = entryOf(event.target);
      if (!entry) return;
      const step = STEPS[event.key];
      if (event.key === "ArrowUp" || event.key === "ArrowDown") moveToSequence(entry.text, step);
      else if (step) {
        const n = (at ?? strongest(entry)).token.n + step;
        if (n >= entry.first && n < entry.last) showTip(spans[n]);
      } else return;
      event.preventDefault();
    });
    addEventListener("scroll", hideTip, { passive: true });
  }

  function listenControls() {
    for (const input of byId("order").querySelectorAll("input")) {
      input.addEventListener("change", () => { state.order = input.value; arrange(); });
    }
    byId("search").querySelector("input").addEventListener("input", (event) => {
      state.search = event.target.value;
      arrange();
    });
  }

  buildQuery();
  buildList();
  buildControls();
  buildNotes();
  listenQuery();
  listenList();
  listenControls();
  render();
  document.documentElement.dataset.ready = "true";
})();
