// The image being read, how far, and what it is taken for.

const subject = {
  begin(packet) {
    this.image = packet.image ?? null;
    clearInterval(this.timer);
    const labels = view.model.classes.map((name) => {
      const label = document.createElement("span");
      label.textContent = name;
      return label;
    });
    find(".chances .labels").replaceChildren(...labels);
    if (this.image) this.image.values = bytes(this.image.pixels);
  },

  // Once the steps are there: show them one after the other.
  play() {
    const steps = newest();
    view.pinned = 0;
    this.timer = setInterval(() => {
      if (view.pinned === null || view.pinned >= steps) {
        clearInterval(this.timer);
        pin(null);
      } else pin(view.pinned + 1);
    }, Math.max(16, 2500 / (steps + 1)));
  },

  draw(run, index) {
    this.drawPicture(index);
    const { classes } = view.model;
    const count = Math.max(1, run.tokens.length);
    let chances = [];
    const columns = run.tokens.map((token) => (chances = token.chances.length ? token.chances : chances));
    drawMap(find(".chances canvas"), count, Math.max(1, classes.length), (row, column) => columns[column]?.length && sequential(palettes.sequential, columns[column][row], 1));
    placeMark(find(".chances .column-mark"), index < 0 ? null : index, count, "x");
    const now = columns[index] ?? [];
    [...find(".chances .labels").children].forEach((label, i) => {
      label.textContent = now.length ? `${classes[i]} · ${percent(now[i])}` : classes[i];
      label.classList.toggle("likeliest", now.length > 0 && now[i] === Math.max(...now));
    });
  },

  drawPicture(index) {
    const canvas = find(".picture canvas");
    const size = this.image?.size ?? 28;
    const { values, channels, boxes } = this.image ?? { channels: 1, boxes: [] };
    const read = new Uint8Array(size * size);
    for (const [left, top, width, height] of boxes.slice(0, index + 1)) {
      for (let y = top; y < top + height; y++) read.fill(1, y * size + left, y * size + left + width);
    }
    drawMap(canvas, size, size, (row, column) => {
      const pixel = row * size + column;
      const at = (channel) => values?.[Math.min(channel, channels - 1) * size * size + pixel] ?? 0;
      const shade = (channel) => Math.round(read[pixel] ? at(channel) : 0.35 * at(channel));
      return ((255 << 24) | (shade(2) << 16) | (shade(1) << 8) | shade(0)) >>> 0;
    });
    const mark = find(".picture .row-mark");
    const box = boxes[index];
    mark.hidden = !box;
    if (!box) return;
    const [left, top, width, height] = box.map((value) => `${(100 * value) / size}%`);
    Object.assign(mark.style, { left, top, width, height, right: "auto" });
  },
};
