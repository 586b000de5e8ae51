// One memory of a model, by replay of what its tokens wrote, and where its recalls came from.
// A token writes `trace ← kept · trace + share ⊗ content`, slot by slot; slots that are off stay as they are.
// Arrays are flat Float32Arrays in row-major order: traces [slots, width], recall weights and shares [slots].
// A memory that averages, a mixer's, recalls means of its bank's entry, with weight 1, and of what was written; and a
// token recalls after it has written, so that it may recall itself.

const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const floats = (base64) => new Float32Array(bytes(base64).buffer);

const KEYFRAME = 64; // tokens between two kept copies of the trace
const FADED = 1e-7; // a write that has decayed to this share of itself is not looked for

class MemoryReplay {
  // `start`: the trace before the run and, if the memory averages, the mass of the writes in it; null for zeros.
  constructor(memory, slots, start) {
    const size = slots * memory.width;
    Object.assign(this, { ...memory, slots, clip: memory.clip ?? Infinity });
    this.start = start ? start.slice(0, size) : new Float32Array(size);
    this.trace = this.start.slice();
    this.mass = new Float32Array(slots);
    if (start && memory.averages) this.mass.set(start.subarray(size));
    // How much of the start is left in each slot. Below, the writes of this run alone, unclipped, if there is a clip.
    this.startLeft = new Float32Array(slots).fill(start ? 1 : 0);
    this.ownTrace = this.clip < Infinity ? new Float32Array(size) : null;
    this.keyframes = [];
    this.reads = []; // what every token recalled and wrote
    // Within a run scales only grow, so that a colour keeps its meaning from frame to frame.
    this.maxima = { recall: 0, trace: 0, norm: 0 };
    this.growMaxima([], this.norms());
  }

  // `values`: recall weights, shares, what is kept, and the content, one after the other.
  push(values, { slotsOff, cleared }) {
    const { slots } = this;
    if (this.reads.length % KEYFRAME === 0) this.keyframes.push(this.trace.slice());
    const [recall, share, [kept], content] = [
      values.subarray(0, slots),
      values.subarray(slots, 2 * slots),
      values.subarray(2 * slots, 2 * slots + 1),
      values.subarray(2 * slots + 1),
    ];
    const read = { recall, share, kept, content, slotsOff, cleared };
    this.reads.push(read);
    if (cleared) this.clear(slotsOff);
    if (!this.averages) this.recallInto(read);
    this.write(read);
    if (this.averages) this.recallInto(read);
    read.norms = this.norms();
    this.growMaxima(recall, read.norms);
  }

  get numbersPerToken() {
    return 2 * this.slots + 1 + this.width;
  }

  clear(slotsOff) {
    for (let n = 0; n < this.slots; n++) if (!slotsOff.has(n)) this.startLeft[n] = this.mass[n] = 0;
    clearSlots(this.trace, this, slotsOff);
    if (this.ownTrace) clearSlots(this.ownTrace, this, slotsOff);
  }

  write(read) {
    writeInto(this.trace, read, this, this.clip);
    if (this.ownTrace) writeInto(this.ownTrace, read, this, Infinity);
    for (let n = 0; n < this.slots; n++) {
      if (read.slotsOff.has(n)) continue;
      this.startLeft[n] *= read.kept;
      this.mass[n] = read.kept * this.mass[n] + read.share[n];
    }
  }

  // What was recalled, as parts whose shares (projections on the recalled memory) add up to 1: `bank`, `carried` (memory
  // from before this run), `tokens` and `clip`. `weights` are those of the sums in the slots: a mean divides by the mass.
  recallInto(read) {
    const { slots, width, bank, scale, averages, mass, trace, start, startLeft, ownTrace } = this;
    const recalled = new Float32Array(width);
    const parts = { bank: new Float32Array(width), carried: new Float32Array(width), own: new Float32Array(width) };
    read.weights = averages ? read.recall.map((weight, n) => weight / (1 + scale * mass[n])) : read.recall;
    for (let n = 0; n < slots; n++) {
      const weight = read.weights[n];
      if (weight === 0) continue;
      for (let h = 0, i = n * width; h < width; h++, i++) {
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
    read.origins = { recalled, square, ...shares };
  }

  // The trace after a token, [slots, width]; -1 is the start.
  traceAfter(index) {
    if (index === this.reads.length - 1) return this.trace;
    const frame = Math.floor((index + 1) / KEYFRAME);
    const trace = (this.keyframes[frame] ?? this.start).slice();
    for (const read of this.reads.slice(frame * KEYFRAME, index + 1)) {
      if (read.cleared) clearSlots(trace, this, read.slotsOff);
      writeInto(trace, read, this, this.clip);
    }
    return trace;
  }

  // The writers of what was recalled at a token, latest first: [{ index, share }]. Slot by slot, a write is recalled
  // with weight scale · (what is left of it) · its share · the reader's weight.
  writers(index, most = Infinity) {
    const { slots, scale } = this;
    const { weights, cleared, origins } = this.reads[index];
    const writers = [];
    if (cleared && !this.averages) return writers;
    for (const [r, left] of this.writesUpTo(this.latestWriter(index))) {
      if (index - r > most) break;
      const { share, content } = this.reads[r];
      let weight = 0;
      for (let n = 0; n < slots; n++) weight += left[n] * weights[n] * share[n];
      writers.push({ index: r, share: (scale * weight * dot(content, origins.recalled)) / origins.square });
    }
    return writers;
  }

  // The latest token that a token can recall.
  latestWriter(index) {
    return this.averages ? index : index - 1;
  }

  // Who of this run wrote into a slot, as of a token: [{ index, share }], as shares of its writes that are left.
  writersOfSlot(index, slot) {
    const writers = [];
    for (const [r, left] of this.writesUpTo(index)) writers.push({ index: r, share: left[slot] * this.reads[r].share[slot] });
    const total = writers.reduce((sum, { share }) => sum + share, 0) || 1;
    return writers.map(({ index: r, share }) => ({ index: r, share: share / total }));
  }

  // Whether a slot still holds something from before this run after a token.
  holdsStart(index, slot) {
    let left = row(this.start, slot, this.width).some((value) => value !== 0) ? 1 : 0;
    for (const { kept, slotsOff, cleared } of this.reads.slice(0, index + 1)) if (!slotsOff.has(slot)) left *= cleared ? 0 : kept;
    return left > FADED;
  }

  // Tokens up to `index` that wrote, with what is left of their writes in each slot, latest first.
  *writesUpTo(index) {
    const left = new Float32Array(this.slots).fill(1);
    for (let r = index; r >= 0; r--) {
      const { share, kept, slotsOff, cleared } = this.reads[r];
      if (share.some((value) => value > 0)) yield [r, left];
      for (let n = 0; n < left.length; n++) if (!slotsOff.has(n)) left[n] *= cleared ? 0 : kept;
      if (left.every((value) => value < FADED)) return;
    }
  }

  norms() {
    const { slots, width, trace } = this;
    return Float32Array.from({ length: slots }, (_, n) => Math.sqrt(dot(row(trace, n, width), row(trace, n, width))));
  }

  growMaxima(recall, norms) {
    this.maxima.recall = largest(recall, this.maxima.recall);
    this.maxima.norm = largest(norms, this.maxima.norm);
    this.maxima.trace = largest(this.trace, this.maxima.trace);
  }
}

function writeInto(trace, { share, kept, content, slotsOff }, { slots, width }, clip) {
  for (let n = 0; n < slots; n++) {
    if (slotsOff.has(n)) continue;
    for (let h = 0, i = n * width; h < width; h++, i++) {
      trace[i] = Math.min(clip, Math.max(-clip, kept * trace[i] + share[n] * content[h]));
    }
  }
}

function clearSlots(trace, { slots, width }, slotsOff) {
  for (let n = 0; n < slots; n++) if (!slotsOff.has(n)) row(trace, n, width).fill(0);
}

const row = (values, index, size) => values.subarray(index * size, (index + 1) * size);

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
