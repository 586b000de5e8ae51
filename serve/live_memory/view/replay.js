// The memory of a run, by replay of what its tokens wrote, and where its recalls came from.
// Arrays are flat Float32Arrays in row-major order: traces [layers, slots, width], recall [layers, slots],
// encodings [layers, width]. Packets are described in packets.py.

const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const floats = (base64) => new Float32Array(bytes(base64).buffer);

const KEYFRAME = 64; // tokens between two kept copies of the trace
const LAGS = 48; // writers that are told apart in the map: the last so many tokens
const FADED = 1e-7; // a write that has decayed to this share of itself is not looked for

function readModel(packet) {
  return { ...packet, clip: packet.trace_clip ?? Infinity, bank: floats(packet.bank) };
}

class Replay {
  constructor(model, packet) {
    const size = model.layers * model.slots * model.width;
    this.model = model;
    this.status = packet.status;
    this.message = "";
    this.erased = packet.erased ?? null;
    this.carriedOver = packet.tokens_seen;
    this.start = packet.trace ? floats(packet.trace) : new Float32Array(size);
    this.trace = this.start.slice();
    this.keyframes = [];
    this.tokens = [];
    // How much of the start is left in each slot. Below, the writes of this run alone, unclipped, if there is a clip.
    this.startLeft = new Float32Array(model.slots).fill(packet.trace ? 1 : 0);
    this.ownTrace = model.clip < Infinity ? new Float32Array(size) : null;
    // Within a run scales only grow, so that a colour keeps its meaning from frame to frame.
    this.maxima = Array.from({ length: model.layers }, () => ({ recall: 0, trace: 0, norm: 0 }));
    this.growMaxima(null, this.norms());
  }

  push(packet) {
    const { model, trace } = this;
    if (this.tokens.length % KEYFRAME === 0) this.keyframes.push(trace.slice());
    const token = {
      text: packet.text,
      isPrompt: packet.is_prompt,
      recall: floats(packet.recall),
      encoding: floats(packet.encoding),
      rate: (packet.plastic ?? true) ? model.hebbian_lr : 0,
      writes: packet.writes ?? true,
      cleared: packet.cleared ?? false,
      slotsOff: new Set(packet.slots_off),
      probability: packet.probability ?? null,
      candidates: packet.candidates ?? [],
      chances: packet.chances ?? [],
    };
    this.tokens.push(token);
    if (token.cleared) {
      trace.fill(0);
      this.ownTrace?.fill(0);
      this.startLeft.fill(0);
    }
    token.origins = Array.from({ length: model.layers }, (_, l) => this.origins(token, l));
    for (let l = 0; l < model.layers; l++) {
      write(model, trace, token, l, model.clip);
      if (this.ownTrace) write(model, this.ownTrace, token, l, Infinity);
    }
    fade(this.startLeft, token);
    token.norms = this.norms();
    this.growMaxima(token.recall, token.norms);
  }

  // The trace of one layer after a token, [slots, width]; -1 is the start.
  traceAfter(index, layer) {
    const { slots, width } = this.model;
    const part = (all) => all.subarray(layer * slots * width, (layer + 1) * slots * width);
    if (index === this.tokens.length - 1) return part(this.trace);
    const frame = Math.floor((index + 1) / KEYFRAME);
    const trace = part(this.keyframes[frame] ?? this.start).slice();
    for (let t = frame * KEYFRAME; t <= index; t++) {
      if (this.tokens[t].cleared) trace.fill(0);
      write(this.model, trace, this.tokens[t], layer, this.model.clip, 0);
    }
    return trace;
  }

  // What a layer recalled at a token, as parts whose shares (projections on the recalled memory) add up to 1.
  // `recalled` is [width]; `bank`, `carried` (memory from before this run), `tokens` and `clip` are shares.
  origins(token, layer) {
    const { slots, width, bank, trace_scale: scale } = this.model;
    const { trace, start, startLeft, ownTrace } = this;
    const recalled = new Float32Array(width);
    const parts = { bank: new Float32Array(width), carried: new Float32Array(width), own: new Float32Array(width) };
    for (let n = 0; n < slots; n++) {
      const weight = token.recall[layer * slots + n];
      if (weight === 0) continue;
      for (let h = 0, i = (layer * slots + n) * width; h < width; h++, i++) {
        parts.bank[h] += weight * bank[i];
        recalled[h] += weight * (bank[i] + scale * trace[i]);
        if (startLeft[n]) parts.carried[h] += weight * scale * startLeft[n] * start[i];
        if (ownTrace) parts.own[h] += weight * scale * ownTrace[i];
      }
    }
    const square = dot(recalled, recalled) || 1;
    const shares = { bank: dot(parts.bank, recalled) / square, carried: dot(parts.carried, recalled) / square };
    const rest = 1 - shares.bank - shares.carried;
    shares.tokens = ownTrace ? dot(parts.own, recalled) / square : rest;
    shares.clip = rest - shares.tokens;
    return { recalled, square, ...shares };
  }

  // The writers of what a layer recalled at a token, latest first: [{ index, share }]. Slot by slot, the write of
  // token r is recalled at t with weight scale · rate · (decay since r) · recall of t · recall of r.
  writers(index, layer, most = Infinity) {
    const { slots, width, trace_scale: scale } = this.model;
    const reader = this.tokens[index];
    const { recalled, square } = reader.origins[layer];
    const recall = ofLayer(reader.recall, layer, slots);
    const writers = [];
    if (reader.cleared) return writers;
    for (const [r, left] of this.writesBefore(index)) {
      if (index - r > most) break;
      const token = this.tokens[r];
      let weight = 0;
      for (let n = 0, i = layer * slots; n < slots; n++, i++) weight += left[n] * recall[n] * token.recall[i];
      const along = dot(ofLayer(token.encoding, layer, width), recalled);
      writers.push({ index: r, share: (scale * token.rate * weight * along) / square });
    }
    return writers;
  }

  // Who wrote what a slot holds after a token: [{ index, share }], as shares of all writes that are left.
  writersOfSlot(index, layer, slot) {
    const { slots } = this.model;
    const writers = [];
    for (const [r, left] of this.writesBefore(index + 1)) {
      writers.push({ index: r, share: this.tokens[r].rate * left[slot] * this.tokens[r].recall[layer * slots + slot] });
    }
    const total = writers.reduce((sum, { share }) => sum + share, 0) || 1;
    return writers.map(({ index: r, share }) => ({ index: r, share: share / total }));
  }

  // Tokens before `index` with what is left of their writes in each slot, latest first.
  *writesBefore(index) {
    const left = new Float32Array(this.model.slots).fill(1);
    for (let r = index - 1; r >= 0; r--) {
      const token = this.tokens[r];
      if (token.writes && token.rate) yield [r, left];
      fade(left, token);
      if (token.cleared || left.every((share) => share < FADED)) return;
    }
  }

  norms() {
    const { layers, slots, width } = this.model;
    const norms = new Float32Array(layers * slots);
    for (let slot = 0, i = 0; slot < norms.length; slot++) {
      let sum = 0;
      for (const end = i + width; i < end; i++) sum += this.trace[i] * this.trace[i];
      norms[slot] = Math.sqrt(sum);
    }
    return norms;
  }

  growMaxima(recall, norms) {
    const { slots, width } = this.model;
    this.maxima.forEach((maxima, l) => {
      if (recall) maxima.recall = largest(ofLayer(recall, l, slots), maxima.recall);
      maxima.norm = largest(ofLayer(norms, l, slots), maxima.norm);
      maxima.trace = largest(ofLayer(this.trace, l, slots * width), maxima.trace);
    });
  }
}

// What a token leaves of older writes: slots that are off keep theirs.
function fade(left, token) {
  for (let n = 0; n < left.length; n++) if (!token.slotsOff.has(n)) left[n] *= 1 - token.rate;
}

// trace ← (1 - η) trace + η recall ⊗ encoding, clipped if the model clips; a token that does not write lets it decay,
// and slots that are off stay as they are.
// `offset`: where the layer begins in `trace`.
function write(model, trace, token, layer, clip, offset = layer * model.slots * model.width) {
  const { slots, width } = model;
  if (!token.rate) return;
  for (let n = 0; n < slots; n++) {
    if (token.slotsOff.has(n)) continue;
    const share = token.writes ? token.rate * token.recall[layer * slots + n] : 0;
    for (let h = 0, i = offset + n * width; h < width; h++, i++) {
      const value = (1 - token.rate) * trace[i] + share * token.encoding[layer * width + h];
      trace[i] = Math.min(clip, Math.max(-clip, value));
    }
  }
}

const ofLayer = (values, layer, size) => values.subarray(layer * size, (layer + 1) * size);

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function largest(values, floor) {
  let max = floor;
  for (const value of values) max = Math.max(max, Math.abs(value));
  return max;
}
