// The pictures. One pixel per value, stretched by the style sheet; square-root scales, so that small values are seen.

// RGBA bytes as ImageData holds them, one word per colour.
function readPalettes(colormaps) {
  const words = (base64) => new Uint32Array(bytes(base64).buffer);
  return Object.fromEntries(Object.entries(colormaps).map(([role, base64]) => [role, words(base64)]));
}

const root = (value, max) => Math.sign(value) * Math.sqrt(Math.min(1, Math.abs(value) / (max || 1)));
const sequential = (palette, value, max) => palette[Math.round(255 * Math.max(0, root(value, max)))];
const diverging = (palette, value, max) => palette[Math.round(127.5 + 127.5 * root(value, max))];

function drawMap(canvas, columns, rows, colourOf) {
  if (canvas.width !== columns) canvas.width = columns;
  if (canvas.height !== rows) canvas.height = rows;
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let row = 0, i = 0; row < rows; row++) for (let column = 0; column < columns; column++, i++) pixels[i] = colourOf(row, column);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// A bar per slot, and a line where every bar would end if recall were even. Slots that are off are hatched.
function drawRecall(canvas, recall, max, slotsOff, { bar, ink }) {
  const scale = window.devicePixelRatio;
  const size = [canvas.clientWidth * scale, canvas.clientHeight * scale].map(Math.round);
  if (canvas.width !== size[0]) canvas.width = size[0];
  if (canvas.height !== size[1]) canvas.height = size[1];
  if (!canvas.width) return;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, ...size);
  const row = canvas.height / recall.length;
  context.globalAlpha = 1;
  context.fillStyle = bar;
  if (max) recall.forEach((share, n) => context.fillRect(0, n * row, (share / max) * canvas.width, Math.max(1, row * 0.75)));
  context.fillStyle = ink;
  if (max) context.fillRect(canvas.width / recall.length / max, 0, scale, canvas.height);
  context.globalAlpha = 0.55;
  for (const n of slotsOff) for (let x = 0; x < canvas.width; x += 6 * scale) context.fillRect(x, n * row, 3 * scale, Math.max(1, row * 0.75));
}

// Where the recalls of the tokens from `from` on came from: a column per token, bank at the bottom.
const ORIGIN_ROWS = 60;
function drawOrigins(canvas, reads, from, columns, colours) {
  const fill = colours.map((rgb) => (255 << 24) | (rgb[2] << 16) | (rgb[1] << 8) | rgb[0]);
  const ends = Array.from({ length: columns }, (_, column) => {
    const origins = reads[from + column]?.origins;
    if (!origins) return null;
    const shares = [origins.bank, origins.carried, origins.tokens, Math.abs(origins.clip)].map((share) => Math.max(0, share));
    const total = shares.reduce((sum, share) => sum + share, 0) || 1;
    let end = 0;
    return shares.map((share) => (end += share / total));
  });
  drawMap(canvas, columns, ORIGIN_ROWS, (row, column) => {
    if (!ends[column]) return 0;
    const height = 1 - (row + 0.5) / ORIGIN_ROWS;
    return fill[ends[column].findIndex((end) => height < end + 1e-6)] ?? fill.at(-1);
  });
}

// Who wrote it: a column per token, a row per distance to the writer.
const LAGS = 48; // writers that are told apart: the last so many tokens
function drawWriters(canvas, memory, from, columns, palette) {
  const shares = new Float32Array(columns * LAGS);
  for (let column = 0; column < columns; column++) {
    const read = memory.reads[from + column];
    if (!read) break;
    const latest = memory.latestWriter(from + column);
    read.lags ??= memory.writers(from + column, LAGS);
    for (const { index, share } of read.lags) if (latest - index < LAGS) shares[(latest - index) * columns + column] = share;
  }
  drawMap(canvas, columns, LAGS, (row, column) => from + column < memory.reads.length && diverging(palette, shares[row * columns + column], 1));
}

// Lines over a picture that mark a column and a row; a mark without a place is hidden.
function placeMark(mark, position, count, axis) {
  mark.hidden = position === null || position < 0 || position >= count;
  mark.style[axis === "x" ? "left" : "top"] = `${(100 * position) / count}%`;
  mark.style[axis === "x" ? "width" : "height"] = `${100 / count}%`;
}

// The column or row of a picture with `count` of them under a pointer.
function under(event, node, count, axis) {
  const box = node.getBoundingClientRect();
  const share = axis === "x" ? (event.clientX - box.left) / box.width : (event.clientY - box.top) / box.height;
  return Math.min(count - 1, Math.max(0, Math.floor(share * count)));
}
