// Body of `js_on_load` of a gr.HTML; in scope: element, props, watch. Packets are described in packets.py.

const find = (selector) => element.querySelector(selector);
const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const floats = (base64) => new Float32Array(bytes(base64).buffer);
const isDark = () => document.body.classList.contains("dark");

// RGBA bytes as ImageData holds them, one word per colour.
const palettes = Object.fromEntries(
  Object.entries(props.colormaps).map(([role, base64]) => [role, new Uint32Array(bytes(base64).buffer)]),
);

let memory;
let layer = 0;
let drawRequested = false;

// --- the memory, by replay of the writes ---

function receive(packet) {
  if (packet.kind === "reset") reset(packet);
  else if (packet.number !== memory.number + 1) {
    memory.status = "error";
    memory.message = "Part of the stream was lost. The next run shows the memory again.";
  } else {
    memory.number = packet.number;
    if (packet.kind === "tokens") packet.tokens.forEach(read);
    if (packet.kind === "status") Object.assign(memory, { status: packet.status, message: packet.message });
  }
  // On a narrow screen the text is below the controls.
  if (packet.status === "waiting" || packet.status === "error") find(".top").scrollIntoView({ block: "nearest" });
  requestDraw();
}

function reset(packet) {
  const { layers, slots, width } = packet;
  memory = {
    layers,
    slots,
    width,
    hebbianLr: packet.hebbian_lr,
    clip: packet.trace_clip ?? Infinity,
    trace: packet.trace ? floats(packet.trace) : new Float32Array(layers * slots * width), // [layers, slots, width]
    recall: new Float32Array(layers * slots), // of the last token
    norms: [], // [layers, slots] after each token
    number: packet.number,
    status: packet.status,
    message: "",
    carriedOver: packet.tokens_seen,
    written: 0,
    lastText: "",
    // Within a run scales only grow, so that a colour keeps its meaning from frame to frame.
    maxima: Array.from({ length: layers }, () => ({ recall: 0, trace: 0, norm: 0 })),
  };
  memory.maxima.forEach((_, l) => growMaxima(l, slotNorms()));
  find(".text").replaceChildren();
  const options = Array.from({ length: layers }, (_, l) => new Option(`${l + 1} of ${layers}`, l, false, l === layer));
  find(".layer").replaceChildren(...options);
}

function read(token) {
  memory.recall = floats(token.recall);
  write(memory.recall, floats(token.encoding));
  const norms = slotNorms();
  memory.norms.push(norms);
  memory.maxima.forEach((_, l) => growMaxima(l, norms));
  memory.written += token.is_prompt ? 0 : 1;
  memory.lastText = token.text;
  if (token.text) append(token);
}

// trace ← (1 - η) trace + η recall ⊗ encoding, clipped if the model clips
function write(recall, encoding) {
  const { layers, slots, width, hebbianLr, clip, trace } = memory;
  let i = 0;
  for (let l = 0; l < layers; l++) {
    for (let n = 0; n < slots; n++) {
      const share = hebbianLr * recall[l * slots + n];
      for (let h = 0; h < width; h++, i++) {
        const value = (1 - hebbianLr) * trace[i] + share * encoding[l * width + h];
        trace[i] = Math.min(clip, Math.max(-clip, value));
      }
    }
  }
}

function slotNorms() {
  const { layers, slots, width, trace } = memory;
  const norms = new Float32Array(layers * slots);
  for (let slot = 0, i = 0; slot < norms.length; slot++) {
    let sum = 0;
    for (const end = i + width; i < end; i++) sum += trace[i] * trace[i];
    norms[slot] = Math.sqrt(sum);
  }
  return norms;
}

function growMaxima(l, norms) {
  const maxima = memory.maxima[l];
  maxima.recall = largest(ofLayer(memory.recall, l), maxima.recall);
  maxima.norm = largest(ofLayer(norms, l), maxima.norm);
  maxima.trace = largest(ofLayer(memory.trace, l), maxima.trace);
}

const ofLayer = (values, l) => values.subarray((l * values.length) / memory.layers, ((l + 1) * values.length) / memory.layers);
const largest = (values, floor) => values.reduce((max, value) => Math.max(max, Math.abs(value)), floor);

// --- text: never as markup ---

function append(token) {
  const span = document.createElement("span");
  span.textContent = token.text;
  if (token.is_prompt) span.className = "prompt";
  const text = find(".text");
  const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
  text.append(span);
  if (atEnd) text.scrollTop = text.scrollHeight;
}

function statusSentence() {
  const { status, message, carriedOver, written, norms } = memory;
  const tokens = `${written} new ${written === 1 ? "token" : "tokens"}`;
  if (status === "idle") return "The memory is empty. Write a prompt and press Generate.";
  if (status === "waiting") return "Waiting for the model …";
  if (status === "length") return `Done after ${tokens}.`;
  if (status === "eos") return `The model ended the text after ${tokens}.`;
  if (status === "stopped") return `Stopped after ${tokens}.`;
  if (status === "error") return message;
  const start = carriedOver ? ` on a memory of ${carriedOver} earlier tokens` : "";
  return norms.length && written ? `Writing${start} …` : `Reading the prompt${start} …`;
}

function tokenSentence() {
  if (!memory.norms.length) return "";
  const recall = ofLayer(memory.recall, layer);
  const top = recall.indexOf(Math.max(...recall));
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const text = memory.lastText.trim() || memory.lastText.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "…";
  const even = percent(1 / memory.slots);
  return `Token ${memory.norms.length} “${text}” recalls slot ${top} most: ${percent(recall[top])} (even share: ${even})`;
}

// --- pictures ---

function requestDraw() {
  if (drawRequested) return;
  drawRequested = true;
  requestAnimationFrame(draw);
}

function draw() {
  drawRequested = false;
  const { slots, width, norms, trace, status } = memory;
  const maxima = memory.maxima[layer];
  const diverging = isDark() ? palettes.diverging_dark : palettes.diverging_light;

  drawRecall(ofLayer(memory.recall, layer), maxima.recall);
  const shown = ofLayer(trace, layer);
  const half = 127.5 / (maxima.trace || 1);
  drawMap(".trace > canvas", width, slots, (n, h) => diverging[Math.floor(shown[n * width + h] * half + 127.5)]);
  const history = norms.map((values) => ofLayer(values, layer));
  const gain = 255 / (maxima.norm || 1);
  const steps = Math.max(1, history.length);
  drawMap(".norms > canvas", steps, slots, (n, t) => history[t] && palettes.sequential[Math.floor(history[t][n] * gain)]);
  drawMap(".trace .scale", 256, 1, (_, i) => diverging[i]);
  drawMap(".norms .scale", 256, 1, (_, i) => palettes.sequential[i]);

  show(".first-slot", "slot 0");
  show(".last-slot", slots - 1);
  show(".recall .maximum", maxima.recall && `${(100 * maxima.recall).toFixed(1)} %`);
  show(".trace .minimum", maxima.trace && `−${maxima.trace.toPrecision(2)}`);
  show(".trace .maximum", maxima.trace && maxima.trace.toPrecision(2));
  show(".trace .last", width - 1);
  show(".norms .maximum", maxima.norm && maxima.norm.toPrecision(2));
  show(".norms .last", norms.length || "");
  show(".status", statusSentence());
  show(".now", tokenSentence());
  find(".status").classList.toggle("error", status === "error");
  find(".text .current")?.classList.remove("current");
  find(".text").lastElementChild?.classList.add("current");
  Object.assign(element.dataset, { status, tokens: norms.length, packets: memory.number });
}

// A status line that is set to what it says already would be read aloud again.
function show(selector, text) {
  const node = find(selector);
  if (node.textContent !== String(text)) node.textContent = text;
}

// One pixel per value; the style sheet stretches it.
function drawMap(selector, columns, rows, colourOf) {
  const canvas = find(selector);
  if (canvas.width !== columns) canvas.width = columns;
  if (canvas.height !== rows) canvas.height = rows;
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let row = 0, i = 0; row < rows; row++) for (let column = 0; column < columns; column++, i++) pixels[i] = colourOf(row, column);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// A bar per slot, and a line where every bar would end if recall were even.
function drawRecall(recall, max) {
  const canvas = find(".recall > canvas");
  const scale = window.devicePixelRatio;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  if (!max || !canvas.width) return;
  const context = canvas.getContext("2d");
  const row = canvas.height / recall.length;
  const { color } = getComputedStyle(canvas);
  context.fillStyle = color;
  recall.forEach((share, n) => context.fillRect(0, n * row, (share / max) * canvas.width, Math.max(1, row * 0.7)));
  context.fillStyle = getComputedStyle(element).color;
  context.fillRect(canvas.width / recall.length / max, 0, scale, canvas.height);
}

find(".layer").addEventListener("change", (event) => {
  layer = Number(event.target.value);
  requestDraw();
});
new MutationObserver(requestDraw).observe(document.body, { attributeFilter: ["class"] });
new ResizeObserver(requestDraw).observe(find(".panels"));
watch("value", () => receive(JSON.parse(props.value)));
receive(JSON.parse(props.value));
// For the console and for tests.
element.memory = () => memory;
