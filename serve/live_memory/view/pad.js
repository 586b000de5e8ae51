// A pad to draw a digit on. In scope, from gr.HTML: element, trigger. Sends SIDE × SIDE pixels, RGB bytes in base64.

const SIDE = 112;
const pad = element.querySelector("canvas");
const ink = pad.getContext("2d", { willReadFrequently: true });
let sent = Date.now();
let last = null;

// Strokes on a field of 280 × 280.
const DIGITS = [
  "M140 50C90 50 80 110 82 150C84 205 108 235 140 232C180 230 200 190 198 140C196 90 180 50 140 50",
  "M115 85L150 50L148 232",
  "M88 95C95 55 185 40 188 100C190 140 120 180 86 228L200 226",
  "M88 70C120 40 185 50 180 95C176 125 145 135 125 136C165 136 198 150 192 190C184 240 110 240 82 212",
  "M160 50L78 170L210 168M168 110L162 236",
  "M190 55L108 55L98 130C130 108 196 115 194 172C192 232 118 245 84 214",
  "M172 48C120 70 84 130 86 182C88 240 190 244 192 182C194 130 110 128 90 176",
  "M82 58L198 56C165 110 140 170 128 236",
  "M178 78C160 40 96 48 100 90C104 130 186 140 188 188C188 246 88 246 92 188C96 142 186 130 178 78",
  "M188 96C180 46 96 44 94 100C92 150 178 150 188 96C190 140 180 190 160 236",
];

Object.assign(ink, { lineWidth: 24, lineCap: "round", lineJoin: "round", strokeStyle: "#fff", fillStyle: "#000" });
const wipe = () => ink.fillRect(0, 0, 280, 280);
wipe();

function send() {
  const small = new OffscreenCanvas(SIDE, SIDE);
  const context = small.getContext("2d");
  context.drawImage(pad, 0, 0, SIDE, SIDE);
  const { data } = context.getImageData(0, 0, SIDE, SIDE);
  let pixels = "";
  for (let i = 0; i < data.length; i += 4) pixels += String.fromCharCode(data[i], data[i + 1], data[i + 2]);
  trigger("drawn", { count: ++sent, side: SIDE, pixels: btoa(pixels) });
}

const at = (event) => [(event.offsetX / pad.clientWidth) * 280, (event.offsetY / pad.clientHeight) * 280];
pad.addEventListener("pointerdown", (event) => {
  pad.setPointerCapture(event.pointerId);
  last = at(event);
});
pad.addEventListener("pointermove", (event) => {
  if (!last) return;
  ink.beginPath();
  ink.moveTo(...last);
  last = at(event);
  ink.lineTo(...last);
  ink.stroke();
});
pad.addEventListener("pointerup", () => {
  last = null;
  send();
});
element.querySelector(".wipe").addEventListener("click", wipe);

element.querySelector("input").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    const image = await createImageBitmap(file);
    const scale = 280 / Math.max(image.width, image.height);
    wipe();
    ink.drawImage(image, (280 - image.width * scale) / 2, (280 - image.height * scale) / 2, image.width * scale, image.height * scale);
    send();
  } catch {
    trigger("refused", { name: file.name });
  }
});

const examples = DIGITS.map((strokes, digit) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = digit;
  button.setAttribute("aria-label", `Example ${digit}`);
  button.addEventListener("click", () => {
    wipe();
    ink.stroke(new Path2D(strokes));
    send();
  });
  return button;
});
element.querySelector(".examples").replaceChildren(...examples);
