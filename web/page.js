// The page sends a scan to api/segment and shows the answer. It contacts no other host.
const find = (selector) => document.querySelector(selector);
const NAMES = { flair: "FLAIR", pre: "Pre-contrast", post: "Post-contrast" };
const SCORES = {
  dsc: "DSC", iou: "IoU", precision: "precision", recall: "recall",
  hd95_mm: "HD95, mm", hd95_px: "HD95, px", assd_mm: "ASSD, mm", assd_px: "ASSD, px",
};

// Choosing

const chosen = {};

function choose(field, files) {
  const others = { images: ["flair", "pre", "post", "mask"], mask: [] }[field] ?? ["images"];
  for (const name of others) if (chosen[name]?.length) choose(name, []);
  chosen[field] = files;
  const names = files.map((file) => file.name);
  let text = names.join(", ") || "none";
  if (names.length > 3) text = `${names[0]} … ${names.at(-1)}, ${names.length} files`;
  find(`[data-chosen=${field}]`).textContent = text;
}

for (const input of document.querySelectorAll("input[type=file]")) {
  input.addEventListener("change", () => choose(input.name, [...input.files]));
}

async function filesIn(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, fail) => entry.file(done, fail));
    file.place = entry.fullPath.slice(1); // files in several folders may share a name
    return [file];
  }
  const reader = entry.createReader(), files = [];
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return files;
    for (const each of some) files.push(...await filesIn(each));
  }
}

for (const name of ["dragover", "dragleave", "drop"]) { // a file dropped outside the zone would replace the page
  window.addEventListener(name, (event) => {
    event.preventDefault();
    find("#drop").classList.toggle("over", name === "dragover");
  });
}
find("#drop").addEventListener("drop", async (event) => {
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  try { choose("images", (await Promise.all(entries.map(filesIn))).flat()); }
  catch { fail("These files could not be read; choose them with a button instead."); }
});

find("#theme").addEventListener("click", () => {
  const { style } = document.documentElement;
  const dark = style.colorScheme ? style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  style.colorScheme = dark ? "light" : "dark";
});

// Sending

find("#send").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!chosen.images?.length && !chosen.flair?.length) return fail("No scan yet: drop one first, or try a phantom.");
  const parts = Object.entries(chosen).flatMap(([field, files]) =>
    files.map((file) => [field, file, file.place || file.webkitRelativePath || file.name]));
  send(find("#register").checked ? [...parts, ["register", "1"]] : parts);
});
find("#phantom").addEventListener("click", () => send([["phantom", "1"]]));

let request; // the one under way

function send(parts) {
  const form = new FormData();
  request = new XMLHttpRequest();
  for (const part of parts) form.append(...part);
  request.open("POST", "api/segment");
  request.setRequestHeader("Accept", "application/x-ndjson");
  request.upload.onprogress = (e) => wait(`sending, ${Math.round(100 * e.loaded / e.total)} %`);
  request.onprogress = ({ target }) => {
    const text = target.responseText, end = text.lastIndexOf("\n");
    if (target.status !== 200 || end < 0) return;
    const line = JSON.parse(text.slice(text.lastIndexOf("\n", end - 1) + 1, end));
    wait(line.waiting, line.done);
  };
  request.onload = ({ target }) => finish(last(target.responseText));
  request.onerror = () => finish({ error: "The server does not answer, or the upload is too large." });
  enable(false);
  wait("sending");
  find("#cancel").focus();
  request.send(form);
}

find("#cancel").addEventListener("click", () => {
  request.abort(); // the server ends what nobody waits for
  enable(true);
  show("nothing");
  document.title = "brainseg";
  find("button.first").focus();
});

function enable(on) {
  for (const button of document.querySelectorAll("#send button")) button.disabled = !on;
}

// The answer is one or more lines of JSON.
function last(text) {
  try { return JSON.parse(text.slice(text.lastIndexOf("\n") + 1)); } catch { return {}; }
}

function finish(answer) {
  enable(true);
  if (answer.lines) presentGrowth(answer);
  else if (answer.summary) present(answer);
  else fail(answer.error ?? "The server stopped answering; try again.");
}

function show(name) {
  for (const part of ["busy", "error", "result", "growth"]) find("#" + part).hidden = part !== name;
}

function wait(text, done) {
  find("#busy span").textContent = text;
  if (done) find("progress").value = done;
  else find("progress").removeAttribute("value");
  show("busy");
  document.title = `${text} – brainseg`;
}

// Tell those who do not see the page, or have turned to another, that it is done.
function arrive(element, title) {
  document.title = `${title} – brainseg`;
  element.focus({ preventScroll: true });
  find("section").scrollIntoView({ block: "nearest" });
}

function fail(error) {
  find("#error").textContent = error;
  show("error");
  arrive(find("#error"), "error");
}

// Showing

function make(tag, properties, ...inside) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
}

function links(downloads) {
  return ["Download:", ...Object.entries(downloads).map(([download, content]) =>
    make("a", { href: `data:application/octet-stream;base64,${content}`, download }, download))];
}

function presentGrowth({ summary, lines, downloads }) {
  find("#growth h3").textContent = `${summary.case}: ${summary.rate}`;
  find("#visits").textContent = summary.notes.join("; ");
  find("#growth img").src = `data:image/png;base64,${downloads["growth.png"]}`;
  find("#growth tbody").replaceChildren(...lines.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)))));
  find("#growth .line").replaceChildren(...links(downloads));
  show("growth");
  arrive(find("#growth h3"), summary.case);
}

async function present({ summary, viewer, downloads }) {
  find("h2").textContent = summary.case;
  find("#numbers").textContent = numbers(summary);
  find("#quality").textContent = quality(summary);
  find("#warning").textContent = summary.warning ?? "";
  find("#notes").replaceChildren(...notes(summary).map((note) => make("li", {}, note)));
  find("#links").replaceChildren(...links(downloads));
  find("#scores").replaceChildren(...Object.keys(SCORES).filter((name) => summary.scores?.[name] !== undefined).map((name) =>
    make("tr", {}, make("td", {}, SCORES[name]), make("td", {}, summary.scores[name]?.toFixed(3) ?? "not defined"))));
  find("#montage").src = `data:image/png;base64,${downloads[`${summary.case}_montage.png`]}`;
  find("#plain").textContent = "";
  show("result");
  arrive(find("h2"), summary.case);
  Object.assign(find("#look"), { hidden: false, ariaBusy: true });
  try {
    await (await import("./viewer.js")).look(viewer, NAMES, summary);
    find("#look").ariaBusy = false;
  } catch (error) {
    find("#look").hidden = true;
    find("#plain").textContent = `The viewer cannot start: ${error.message}. The mask can be downloaded below.`;
    find("#result details").open = true;
  }
}

function numbers(summary) {
  const touched = summary.slices_touched;
  if (!touched.length) return "The network found no lesion.";
  let size = `${summary.lesion_voxels} voxels`;
  if (summary.lesion_ml !== null) size = `${summary.lesion_ml.toFixed(2)} ml (${size})`;
  return `The network found a lesion of ${size}, on ${touched.length} of ${summary.shape[0]} slices: ${touched[0]} to ${touched.at(-1)}.`;
}

function quality(summary) {
  const said = [], truth = summary.scores?.dsc;
  if (summary.expected_dsc != null) {
    const [dsc, low, high] = ["", "_low", "_high"].map((part) => summary[`expected_dsc${part}`]?.toFixed(2));
    const range = low && high ? ` (${low} to ${high} in 8 of 10 scans)` : "";
    said.push(`The mask would probably reach a DSC of ${dsc}${range} with an expert's.`);
  }
  else if (summary.no_expected_dsc) said.push(`How good the mask probably is, is not known: ${summary.no_expected_dsc}.`);
  if (truth != null) said.push(`Compared with the true mask, its DSC is ${truth.toFixed(2)}.`);
  if (said.length) said.push("DSC says how far two masks agree: 0 is no overlap, 1 is the same mask. Two experts who outline the same tumour reach about 0.84.");
  if (summary.trained_on) said.push("The network was trained on this patient: it has seen the right answer, so its DSC does not count.");
  return said.join(" ");
}

function notes(summary) {
  if (summary.spacing) return summary.notes;
  return [...summary.notes, "These slices do not say how large a pixel is or how far apart they are: sizes are in voxels, and the viewer draws them about as tall as a head."];
}
