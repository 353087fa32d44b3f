// The page: sends a scan to api/segment and draws what comes back. Nothing leaves for elsewhere.
const find = (selector) => document.querySelector(selector);
const NAMES = { pre: "pre-contrast", flair: "FLAIR", post: "post-contrast" };
const SCORES = {
  dsc: "DSC", iou: "IoU", precision: "precision", recall: "recall",
  hd95_mm: "HD95, mm", hd95_px: "HD95, px", assd_mm: "ASSD, mm", assd_px: "ASSD, px",
};
const chosen = { images: [], mask: [] };
let result = null;

// Choosing

function choose(field, files) {
  if (field === "images") choose("mask", []); // it was of the scan before
  chosen[field] = files;
  const names = files.map((file) => file.name);
  find(field === "mask" ? "#chosen-mask" : "#chosen").textContent =
    !names.length ? "none" : names.length > 3 ? `${names[0]} … ${names.at(-1)}, ${names.length} files` : names.join(", ");
}

for (const input of document.querySelectorAll("input[type=file]")) {
  input.addEventListener("change", () => choose(input.name, [...input.files]));
}

async function filesIn(entry) {
  if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
  const reader = entry.createReader(), files = [];
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return files;
    for (const each of some) files.push(...await filesIn(each));
  }
}

const drop = find("#drop");
for (const event of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(event, (e) => {
    e.preventDefault();
    drop.classList.toggle("over", event === "dragover");
  });
}
drop.addEventListener("drop", async (event) => {
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  try { choose("images", (await Promise.all(entries.map(filesIn))).flat()); }
  catch { fail("What was dropped could not be read; choose it instead."); }
});

for (const event of ["dragover", "drop"]) { // beside the zone, it would take the page's place
  window.addEventListener(event, (e) => e.preventDefault());
}

// Sending

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!chosen.images.length) return fail("No scan yet: drop one first, or try a phantom.");
  const form = new FormData();
  for (const [field, files] of Object.entries(chosen)) for (const file of files) form.append(field, file);
  send(form);
});

find("#phantom").addEventListener("click", () => {
  const form = new FormData();
  form.append("phantom", "1");
  send(form);
});

function send(form) {
  const request = new XMLHttpRequest();
  request.open("POST", "api/segment");
  request.setRequestHeader("Accept", "application/x-ndjson");
  request.upload.onprogress = (e) => wait(`sending, ${Math.round(100 * e.loaded / e.total)} %`);
  request.onprogress = () => {
    const text = request.responseText, end = text.lastIndexOf("\n");
    if (request.status !== 200 || end < 0) return;
    const line = JSON.parse(text.slice(text.lastIndexOf("\n", end - 1) + 1, end));
    wait(line.waiting, line.done);
  };
  request.onload = () => finish(last(request.responseText));
  request.onerror = () => finish({ error: "The server does not answer, or the upload is too large for it." });
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  wait("sending");
  request.send(form);
}

// The answer is lines of JSON, or one.
function last(text) {
  try { return JSON.parse(text.slice(text.lastIndexOf("\n") + 1)); } catch { return {}; }
}

function finish(answer) {
  for (const button of document.querySelectorAll("button")) button.disabled = false;
  if (answer.slices) present(answer);
  else fail(answer.error ?? "The server broke off; try again.");
}

function show(name) {
  for (const part of ["hint", "busy", "error", "result"]) find("#" + part).hidden = part !== name;
}

function wait(text, done) {
  find("#busy span").textContent = text;
  if (done) find("progress").value = done;
  else find("progress").removeAttribute("value");
  show("busy");
}

function fail(error) {
  find("#error").textContent = error;
  show("error");
}

// Looking

function present(answer) {
  result = answer;
  const { summary, slices } = answer;
  find("h2").textContent = summary.case;
  find("#numbers").textContent = numbers(summary);
  find("[type=range]").max = slices.length - 1;
  find("[type=range]").value = answer.first;
  find("#sequences").replaceChildren(...Object.keys(NAMES).filter((n) => slices[0][n]).map(radio));
  find("#legend").textContent = "Outlined in red: what the network found"
    + (summary.scores ? "; in green: the true mask" : "") + ". Yellow: its probability.";
  find("#links").replaceChildren("Download:", ...Object.entries(answer.downloads).map(([name, url]) =>
    Object.assign(document.createElement("a"), { href: url, download: name, textContent: name })));
  find("#scores").replaceChildren(...Object.keys(SCORES).filter((name) =>
    summary.scores?.[name] !== undefined).map((name) => score(name, summary.scores[name])));
  find("#montage").src = answer.montage;
  find("#film").src = answer.film;
  show("result");
  find("section").scrollIntoView({ block: "nearest" });
  draw();
}

function numbers(summary) {
  const touched = summary.slices_touched, voxels = `${summary.lesion_voxels} voxels`;
  if (!touched.length) return ["No lesion was found.", ...summary.notes].join(" ");
  const size = summary.lesion_ml === null ? voxels : `${summary.lesion_ml.toFixed(2)} ml (${voxels})`;
  const where = `on ${touched.length} of ${summary.shape[0]} slices, ${touched[0]} to ${touched.at(-1)}`;
  return [`Lesion: ${size} ${where}.`, ...summary.notes].join(" ");
}

function radio(name) {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "sequence", value: name, checked: name === "flair" });
  label.append(input, ` ${NAMES[name]}`);
  return label;
}

function score(name, value) {
  const row = document.createElement("tr");
  row.insertCell().textContent = SCORES[name];
  row.insertCell().textContent = value === null ? "not defined" : value.toFixed(3);
  return row;
}

async function pixels(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

let latest = 0;

async function draw() {
  const mine = ++latest, index = Number(find("[type=range]").value), slice = result.slices[index];
  find("output").textContent = `slice ${result.numbers[index]} of ${result.numbers.at(-1)}`;
  const sequence = find("#sequences input:checked").value;
  const [picture, overlay] = await Promise.all([pixels(slice[sequence]), pixels(slice.overlay)]);
  if (mine !== latest) return; // the slider has moved on
  paint(picture, overlay, find("#outline").checked, find("#heat").checked);
  const canvas = Object.assign(find("canvas"), { width: picture.width, height: picture.height });
  canvas.getContext("2d").putImageData(picture, 0, 0);
  canvas.dataset.drawn = mine;
}

// The overlay's red is the probability, its green the mask, its blue the true mask.
function paint({ width, height, data }, overlay, outline, heat) {
  const over = overlay.data;
  const isIn = (x, y, c) => x >= 0 && y >= 0 && x < width && y < height && over[4 * (y * width + x) + c] > 0;
  const isEdge = (x, y, c) => isIn(x, y, c) &&
    !(isIn(x - 1, y, c) && isIn(x + 1, y, c) && isIn(x, y - 1, c) && isIn(x, y + 1, c));
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const at = 4 * (y * width + x), share = 0.7 * over[at] / 255;
      if (heat) [255, 190, 0].forEach((c, k) => { data[at + k] += (c - data[at + k]) * share; });
      if (outline && isEdge(x, y, 2)) data.set([0, 255, 0], at);
      if (outline && isEdge(x, y, 1)) data.set([255, 0, 0], at);
    }
  }
}

find("#result").addEventListener("input", draw);
