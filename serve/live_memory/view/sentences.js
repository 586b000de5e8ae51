// What the pictures say, in words.

const plural = (count, unit) => `${count} new ${count === 1 ? unit : `${unit}s`}`;

function statusSentence(view, unit) {
  const run = view.runs.at(-1);
  const { status, message, carriedOver, tokens, erased } = run;
  const written = tokens.filter((token) => !token.isPrompt).length;
  if (status === "idle" && carriedOver) return `A memory of ${carriedOver} ${unit}s. The next run can begin with it.`;
  if (status === "idle") return unit === "token" ? "The memory is empty. Write a prompt and press Generate." : "The memory is empty. Draw a digit, or choose an example.";
  if (status === "waiting") return "Waiting for the model …";
  if (status === "error") return message;
  if (status === "read") return message;
  if (erased !== null && status !== "running") {
    const differing = tokens.filter((token, i) => i > erased && token.text !== view.runs[0].tokens[i]?.text).length;
    const writer = quoted(view.runs[0].tokens[erased]);
    const after = tokens.length - erased - 1;
    return `Without what ${writer} wrote, ${differing || "none"} of the ${after} tokens after it came out differently.`;
  }
  if (status === "length") return `Done after ${plural(written, unit)}.`;
  if (status === "eos") return `The model ended the text after ${plural(written, unit)}.`;
  if (status === "stopped") return `Stopped after ${plural(written, unit)}.`;
  const start = carriedOver ? ` on a memory of ${carriedOver} earlier ${unit}s` : "";
  return written ? `Writing${start} …` : `Reading${start} …`;
}

function tokenSentence(view, run, index, writers, unit) {
  const token = run.tokens[index];
  const memory = run.memories[view.memory];
  const { recall, norms } = memory.reads[index];
  const slot = currentSlot();
  const place = `${unit[0].toUpperCase()}${unit.slice(1)} ${index + 1} of ${run.tokens.length}${unit === "token" ? ` ${quoted(token)}` : ""}`;
  const authors = [...writers].sort((a, b) => b.share - a.share).slice(0, 3).filter(({ share }) => share > 0.005);
  const list = authors.map(({ index: r, share }) => `${r === index ? "itself" : `${unit === "token" ? quoted(run.tokens[r]) : unit} ${r + 1}`} (${percent(share)})`).join(", ");
  const notes = [];
  if (token.cleared) notes.push("The memory was emptied before it.");
  if (!token.plastic) notes.push("Plasticity was frozen: it wrote nothing, and nothing faded.");
  else if (!token.writes) notes.push("What it wrote is left out.");
  const note = notes.length ? ` ${notes.join(" ")}` : "";
  if (slot !== null) {
    const held = memory.holdsStart(index, slot)
      ? `it holds memory from before this text${list ? `, and what this text wrote into it is by ${list}` : ""}`
      : list ? `what it holds was written by ${list}` : "nothing has been written to it";
    return `${place}: slot ${slot} has ${percent(recall[slot])} of the recall and norm ${norms[slot].toPrecision(2)}; ${held}.${note}`;
  }
  const top = recall.indexOf(Math.max(...recall));
  const who = list ? ` Of what it recalled, most was written by ${list}.` : "";
  return `${place} recalls slot ${top} most: ${percent(recall[top])} (even share: ${percent(1 / recall.length)}).${who}${note}`;
}

// What the token memory added is told from one percent on.
function chanceSentence(token) {
  const { probability, remembered } = token;
  const had = `${quoted(token)} had ${percent(probability)}`;
  if (!remembered || remembered.probability < 0.01 * probability) return had;
  const writers = remembered.writers.map(([index, part]) => `${index + 1} (${percent(part / probability)})`).join(", ");
  const by = writers ? `, by token ${writers}` : "";
  return `${had}, ${percent(remembered.probability / probability)} of it remembered${by}`;
}

function lagsSentence({ averages }, unit) {
  const top = averages ? `the ${unit} itself` : `the ${unit} just before`;
  return `top: ${top} · bottom: ${averages ? LAGS - 1 : LAGS} ${unit}s before`;
}

function exactnessSentence(clip, origins) {
  if (!origins) return "";
  if (clip === Infinity) return "Exact: the parts add up to what was recalled.";
  if (Math.abs(origins.clip) < 5e-4) return `Exact here: the clip at ±${clip} changed nothing that was recalled.`;
  return `Approximate: the trace was clipped at ±${clip}, which hides who wrote that part.`;
}

const tenths = (share) => `${(100 * share).toFixed(1)} %`;

function changeRow(original, [index, token, before, after]) {
  const row = document.createElement("tr");
  const words = original.tokens.slice(Math.max(0, index - 2), index + 1).map(({ text }) => text);
  const cells = [`…${words.join("").replaceAll("\n", "⏎")}`, named({ text: token }), tenths(before), `${after > before ? "▲" : "▼"} ${tenths(after)}`];
  row.replaceChildren(
    ...cells.map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }),
  );
  row.dataset.index = index;
  return row;
}
