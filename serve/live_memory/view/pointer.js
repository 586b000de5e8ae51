// Pointer and keyboard: hovering peeks, a click stays, Escape follows the newest token again.

function follow(name, value) {
  if (view[name] === value) return;
  view[name] = value;
  requestDraw();
}

function pin(index) {
  follow("pinned", index);
  if (index !== null) view.texts.forEach((text) => text.reveal(index));
}

[".original", ".without"].forEach((selector, which) => {
  const node = find(selector);
  const peek = (event) => {
    const index = indexOf(event);
    if (index !== null) view.active = which;
    follow("hovered", index);
  };
  node.addEventListener("mouseover", peek);
  node.addEventListener("mouseleave", () => follow("hovered", null));
  node.addEventListener("click", (event) => {
    const index = indexOf(event);
    if (index !== null) pin(view.pinned === index ? null : index);
  });
  node.addEventListener("focus", () => (view.active = Math.min(which, view.runs.length - 1)));
});

element.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    Object.assign(view, { pinnedSlot: null, hovered: null });
    pin(null);
    return;
  }
  if (!event.target.classList.contains("text") || newest() < 0) return;
  const place = view.pinned ?? newest();
  const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: newest() }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  view.hovered = null;
  pin(Math.max(0, Math.min(newest(), to)));
});

find(".scrubber").addEventListener("input", (event) => {
  view.hovered = null;
  pin(Number(event.target.value));
});
find(".live").addEventListener("click", () => pin(null));

// Panels over time: a column is a token. Panels of slots: a row is a slot.
const tokenUnder = (event, plot) => {
  const index = view.from + under(event, plot, view.columns, "x");
  return index <= newest() ? index : null;
};
for (const plot of element.querySelectorAll(".timed")) {
  plot.addEventListener("mousemove", (event) => follow("hovered", tokenUnder(event, plot)));
  plot.addEventListener("mouseleave", () => follow("hovered", null));
  plot.addEventListener("click", (event) => pin(tokenUnder(event, plot)));
}
for (const plot of element.querySelectorAll(".slotted")) {
  const slotUnder = (event) => under(event, plot, view.model.slots, "y");
  plot.addEventListener("mousemove", (event) => follow("slot", slotUnder(event)));
  plot.addEventListener("mouseleave", () => follow("slot", null));
  plot.addEventListener("click", (event) => {
    const slot = slotUnder(event);
    if (event.shiftKey) toggle(slot);
    else follow("pinnedSlot", view.pinnedSlot === slot ? null : slot);
  });
}

// Rapid events may arrive in another order: the server takes the one with the highest count.
let toggles = Date.now();
let toggleTimer;
function toggle(slot) {
  const off = new Set(view.slotsOff);
  if (!off.delete(slot)) off.add(slot);
  view.slotsOff = [...off].sort((a, b) => a - b);
  requestDraw();
  clearTimeout(toggleTimer);
  toggleTimer = setTimeout(() => trigger("switch_slots", { count: ++toggles, slots: view.slotsOff }), 150);
}

find(".erase").addEventListener("click", () => trigger("erase", { index: current() }));
find(".changes").addEventListener("click", (event) => {
  const row = event.target.closest("tr[data-index]");
  if (!row) return;
  view.active = 0;
  pin(Number(row.dataset.index));
});
find(".memory").addEventListener("change", (event) => follow("memory", Number(event.target.value)));

new MutationObserver(requestDraw).observe(document.body, { attributeFilter: ["class"] });
new ResizeObserver(requestDraw).observe(find(".panels"));
watch("value", () => receive(JSON.parse(props.value)));
find(".image").hidden = !isImage;
for (const part of [".texts", ".erase", ".candidates"]) find(part).hidden = isImage;
show(".this-run", isImage ? "this image" : "this text");
if (props.value) receive(JSON.parse(props.value));
// For the console and for tests.
Object.assign(element, { view, receive });
