// A run: its tokens, and all memories of the model while they are read. Packets are described in packets.py.

function readModel(packet) {
  return { ...packet, memories: packet.memories.map((memory) => ({ ...memory, bank: floats(memory.bank) })) };
}

class Replay {
  constructor(model, packet) {
    this.status = packet.status;
    this.message = "";
    this.erased = packet.erased ?? null;
    this.carriedOver = packet.tokens_seen;
    this.tokens = [];
    this.parts = 0; // packets of tokens
    this.isBroken = false; // one of them was lost: what follows it cannot be replayed
    this.memories = model.memories.map((memory, m) => {
      return new MemoryReplay(memory, model.slots, packet.traces ? floats(packet.traces[m]) : null);
    });
  }

  push(packet) {
    const token = {
      text: packet.text,
      isPrompt: packet.is_prompt,
      plastic: packet.plastic ?? true,
      writes: packet.writes ?? true,
      cleared: packet.cleared ?? false,
      slotsOff: new Set(packet.slots_off),
      probability: packet.probability ?? null,
      candidates: packet.candidates ?? [],
      remembered: packet.remembered ?? null,
      chances: packet.chances ?? [],
    };
    this.tokens.push(token);
    const values = floats(packet.memories);
    let from = 0;
    for (const memory of this.memories) memory.push(values.subarray(from, (from += memory.numbersPerToken)), token);
  }
}
