// A text, token by token; never as markup.

class TokenText {
  constructor(node) {
    this.node = node;
    this.node.replaceChildren();
    this.spans = [];
    this.waiting = []; // to be put on the page with the next drawing
    this.shaded = [];
    this.marked = {};
    this.atEnd = true; // until the reader scrolls back
    this.node.onscroll = () => (this.atEnd = node.scrollHeight - node.scrollTop - node.clientHeight < 60);
  }

  append(token, classes) {
    const span = document.createElement("span");
    span.textContent = token.text;
    span.dataset.index = this.spans.length;
    span.className = classes;
    this.spans.push(span);
    this.waiting.push(span);
  }

  flush() {
    if (this.waiting.length) this.node.append(...this.waiting);
    this.waiting = [];
  }

  // Once per frame: reading a height makes the browser lay out the text.
  follow() {
    if (this.atEnd) this.node.scrollTop = this.node.scrollHeight;
  }

  // Colour tokens by [{ index, share }], in the colours of the map of writers.
  shade(writers, palette) {
    for (const span of this.shaded) span.style.backgroundColor = "";
    this.shaded = [];
    const max = largest(writers.map(({ share }) => share), 0.02);
    for (const { index, share } of writers) {
      const strength = Math.abs(share) / max;
      if (strength < 0.03 || !this.spans[index]) continue;
      const colour = palette[share > 0 ? 208 : 48];
      const rgb = `${colour & 255} ${(colour >> 8) & 255} ${(colour >> 16) & 255}`;
      this.spans[index].style.backgroundColor = `rgb(${rgb} / ${(0.12 + 0.58 * strength).toFixed(3)})`;
      this.shaded.push(this.spans[index]);
    }
  }

  // Move a class to one token, or to none.
  mark(name, index) {
    if (this.marked[name] === index) return;
    this.spans[this.marked[name]]?.classList.remove(name);
    this.spans[index]?.classList.add(name);
    this.marked[name] = index;
  }

  reveal(index) {
    const span = this.spans[index];
    if (!span) return;
    const above = span.offsetTop - this.node.scrollTop;
    if (above < 0 || above > this.node.clientHeight - 30) this.node.scrollTop = span.offsetTop - this.node.clientHeight / 2;
  }
}

const indexOf = (event) => (event.target.dataset?.index === undefined ? null : Number(event.target.dataset.index));

// What is between quotation marks where a token is named.
const named = (token) => token.text.trim() || token.text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "…";
const quoted = (token) => `“${named(token)}”`;
const percent = (share) => `${(100 * share).toFixed(Math.abs(share) < 0.0995 ? 1 : 0)} %`;
