// Wiring: packets in, one drawing per animation frame, and a pointer that all panels follow.
// In scope, from gr.HTML: element, props, watch, trigger; from the files before this one: Replay, TokenText, draw….

const find = (selector) => element.querySelector(selector);
const isDark = () => document.body.classList.contains("dark");
const palettes = readPalettes(props.colormaps);
const divergingPalette = () => (isDark() ? palettes.diverging_dark : palettes.diverging_light);
const isImage = props.reads === "image";
const ORIGIN_COLOURS = [[0, 114, 178], [150, 150, 150], [230, 159, 0], [204, 121, 167]]; // Okabe and Ito
const ENDED = ["eos", "length", "stopped"];

const view = {
  model: null,
  runs: [], // the run, and beside it the same without one write
  texts: [],
  active: 0, // the one whose memory is shown
  memory: 0, // the one of the model's memories that is shown
  hovered: null, // token under the pointer
  pinned: null, // token to stay at; null follows the newest
  slot: null,
  pinnedSlot: null,
  slotsOff: [],
  changes: [],
  from: 0, // first token of the panels over time
  packets: 0, // received
  drawings: 0,
  textDrawn: 0, // when
  drawRequested: false,
};

const activeRun = () => view.runs[Math.min(view.active, view.runs.length - 1)];
const activeMemory = () => activeRun().memories[view.memory];
const newest = () => activeRun().tokens.length - 1;
const current = () => Math.min(view.hovered ?? view.pinned ?? newest(), newest());
const currentSlot = () => view.slot ?? view.pinnedSlot;

// --- packets ---

function receive(packet) {
  const run = view.runs.at(-1);
  if (packet.kind === "model") begin(readModel(packet));
  else if (packet.kind === "run") beginRun(packet);
  else if (packet.kind === "tokens") readPart(packet);
  else if (packet.kind === "changes") view.changes = packet.changes;
  else if (packet.kind === "slots") view.slotsOff = packet.slots;
  else if (packet.kind === "status" && !(run.isBroken && ENDED.includes(packet.status))) {
    Object.assign(run, { status: packet.status, message: packet.message });
  }
  view.packets += 1;
  // On a narrow screen the text is below the controls.
  if (packet.status === "waiting" || packet.status === "error") find(".status").scrollIntoView({ block: "nearest" });
  requestDraw();
}

function begin(model) {
  view.model = model;
  view.memory = Math.min(view.memory, model.memories.length - 1);
  view.slotsOff = [];
  const names = model.memories.map(({ layer, head }, m) => {
    const name = `${layer + 1} of ${model.layers}${head === null ? "" : `, head ${head + 1}`}`;
    return new Option(name, m, false, m === view.memory);
  });
  find(".memory").replaceChildren(...names);
  beginRun({ status: "idle", tokens_seen: 0 });
}

function beginRun(packet) {
  const run = new Replay(view.model, packet);
  const beside = run.erased !== null;
  if (!beside) Object.assign(view, { pinned: null, pinnedSlot: null, from: 0 });
  view.runs = beside ? [view.runs[0], run] : [run];
  view.texts = [...view.texts.slice(0, view.runs.length - 1), new TokenText(find(beside ? ".without" : ".original"))];
  Object.assign(view, { active: view.runs.length - 1, changes: [], hovered: null });
  if (!isImage) return;
  subject.begin(packet);
  (packet.tokens ?? []).forEach(read);
  run.message = packet.message ?? "";
  if (run.tokens.length) subject.play();
}

function readPart(packet) {
  const run = view.runs.at(-1);
  run.isBroken ||= packet.part !== ++run.parts;
  if (!run.isBroken) packet.tokens.forEach(read);
  else Object.assign(run, { status: "error", message: "Part of the stream was lost. The next run shows the memory again." });
}

function read(packet) {
  const run = view.runs.at(-1);
  run.push(packet);
  const index = run.tokens.length - 1;
  const token = run.tokens[index];
  const differs = run.erased !== null && index > run.erased && token.text !== view.runs[0].tokens[index]?.text;
  const classes = { prompt: token.isPrompt, silent: !token.writes, frozen: !token.plastic, cleared: token.cleared, differs };
  view.texts.at(-1).append(token, Object.keys(classes).filter((name) => classes[name]).join(" "));
}

// --- drawing ---

function requestDraw() {
  if (view.drawRequested) return;
  view.drawRequested = true;
  requestAnimationFrame(draw);
}

function draw() {
  const begun = performance.now();
  view.drawRequested = false;
  if (!view.model) return;
  const run = activeRun();
  const index = current();
  if (view.isDark !== isDark()) dress();
  const columns = isImage && run.tokens.length ? Math.min(240, run.tokens.length) : Math.max(40, Math.min(240, Math.floor(find(".norms .plot").clientWidth / 3)));
  keepInWindow(index, columns);
  drawSlots(index);
  drawTimes(index, columns);
  // Text costs the browser more than pictures: while it is being written, it is drawn ten times a second.
  const isLive = view.runs.at(-1).status === "running" && view.hovered === null && view.pinned === null;
  if (isLive && begun - view.textDrawn < 100) setTimeout(requestDraw, 100);
  else {
    view.textDrawn = begun;
    drawText(run, index);
  }
  if (isImage) subject.draw(run, index);
  view.drawings += 1;
  view.milliseconds = performance.now() - begun;
}

// What depends on light or dark alone.
function dress() {
  view.isDark = isDark();
  view.colours = { bar: getComputedStyle(find(".recall canvas")).color, ink: getComputedStyle(element).color };
  for (const scale of [".trace .scale", ".writers .scale"]) drawMap(find(scale), 256, 1, (_, i) => divergingPalette()[i]);
  drawMap(find(".norms .scale"), 256, 1, (_, i) => palettes.sequential[i]);
}

// The panels over time show a window that moves when the token shown leaves it.
function keepInWindow(index, columns) {
  if (view.hovered !== null) return;
  const last = Math.max(0, activeRun().tokens.length - columns);
  if (view.pinned === null) view.from = last;
  else if (index < view.from || index >= view.from + columns) view.from = Math.max(0, Math.min(last, index - Math.floor(columns / 2)));
}

function drawSlots(index) {
  const memory = activeMemory();
  const { slots, width, maxima } = memory;
  const read = memory.reads[index];
  const palette = divergingPalette();
  const slotsOff = index === newest() ? view.slotsOff : read.slotsOff;
  drawRecall(find(".recall canvas"), read?.recall ?? new Float32Array(slots), maxima.recall, slotsOff, view.colours);
  const trace = memory.traceAfter(index);
  drawMap(find(".trace .plot canvas"), width, slots, (n, h) => diverging(palette, trace[n * width + h], maxima.trace));
  for (const mark of element.querySelectorAll(".slotted .row-mark")) placeMark(mark, currentSlot(), slots, "y");
  show(".last-slot", slots - 1);
  show(".recall .maximum", maxima.recall ? percent(maxima.recall) : "");
  show(".trace .minimum", maxima.trace ? `−${maxima.trace.toPrecision(2)}` : "");
  show(".trace .maximum", maxima.trace ? maxima.trace.toPrecision(2) : "");
  show(".trace .axis .last", width - 1);
}

function drawTimes(index, columns) {
  const { from } = view;
  const memory = activeMemory();
  const { reads, maxima } = memory;
  drawMap(find(".norms .plot canvas"), columns, memory.slots, (n, t) => {
    const read = reads[from + t];
    return read && sequential(palettes.sequential, read.norms[n], maxima.norm);
  });
  drawOrigins(find(".origins canvas"), reads, from, columns, ORIGIN_COLOURS);
  drawWriters(find(".writers .plot canvas"), memory, from, columns, divergingPalette());
  show(".writers .axis span", lagsSentence(memory, props.unit));
  for (const mark of element.querySelectorAll(".timed .column-mark")) placeMark(mark, index < 0 ? null : index - from, columns, "x");
  show(".norms .maximum", maxima.norm ? maxima.norm.toPrecision(2) : "");
  show(".norms .first", `${props.unit} ${from + 1}`);
  show(".norms .last", Math.max(from + columns, 1));
  view.columns = columns;
}

function drawText(run, index) {
  const token = run.tokens[index];
  const slot = currentSlot();
  const writers = !token ? [] : slot === null ? activeMemory().writers(index) : activeMemory().writersOfSlot(index, slot);
  view.texts.forEach((text, which) => {
    text.flush();
    const isActive = view.runs[which] === run;
    text.shade(isActive ? writers : [], divergingPalette());
    text.mark("current", isActive ? index : null);
    text.mark("pinned", isActive ? view.pinned : null);
    if (view.pinned === null && view.hovered === null) text.follow();
  });
  view.texts[0].mark("erased", view.runs[1]?.erased ?? null);

  const scrubber = find(".scrubber");
  scrubber.max = Math.max(0, newest());
  if (document.activeElement !== scrubber || view.pinned === null) scrubber.value = Math.max(0, index);
  const sentence = token ? tokenSentence(view, run, index, writers, props.unit) : "";
  scrubber.setAttribute("aria-valuetext", sentence || "nothing read yet");
  scrubber.disabled = index < 0;
  const atRest = !["running", "waiting"].includes(view.runs.at(-1).status);
  find(".live").setAttribute("aria-pressed", view.pinned === null);
  find(".erase").disabled = isImage || index < 0 || !atRest || view.active !== 0 || run.isBroken;
  show(".now", sentence);
  show(".status", statusSentence(view, props.unit));
  find(".status").classList.toggle("error", view.runs.at(-1).status === "error");
  showOrigins(activeMemory().reads[index]?.origins);
  showCandidates(token);
  showComparison();
  const { status, tokens } = view.runs.at(-1);
  Object.assign(element.dataset, { status, tokens: tokens.length, current: index, packets: view.packets });
}

function showOrigins(origins) {
  for (const part of ["bank", "carried", "tokens", "clip"]) show(`.${part}-share`, origins ? percent(origins[part]) : "");
  const { clip } = activeMemory();
  find(".clip-legend").hidden = clip === Infinity;
  show(".exactness", exactnessSentence(clip, origins));
}

function showCandidates(token) {
  const list = find(".candidates ol");
  if (list.shown === token) return;
  list.shown = token;
  show(".candidates .title", token?.candidates.length ? `${chanceSentence(token)}; most likely were` : "");
  const rows = (token?.candidates ?? []).map(([text, probability]) => {
    const row = document.createElement("li");
    row.textContent = `${named({ text })} ${percent(probability)}`;
    row.style.setProperty("--share", probability);
    row.classList.toggle("chosen", text === token.text);
    return row;
  });
  list.replaceChildren(...rows);
}

function showComparison() {
  const run = view.runs[1];
  const [original, beside] = element.querySelectorAll(".side");
  beside.hidden = !run;
  original.querySelector(".title").hidden = !run;
  find(".changes").hidden = !view.changes.length;
  if (!run) return;
  beside.querySelector(".title").textContent = `Without what ${quoted(view.runs[0].tokens[run.erased])} wrote`;
  const body = find(".changes tbody");
  if (body.shown === view.changes) return;
  body.shown = view.changes;
  body.replaceChildren(...view.changes.map((change) => changeRow(view.runs[0], change)));
}

// A line that is set to what it says already would be read aloud again.
function show(selector, text) {
  const node = find(selector);
  if (node.textContent !== String(text)) node.textContent = text;
}
