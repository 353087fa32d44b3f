// What the server has sent of a case, drawn in the browser; runs with `element`, `props`, `watch`.
const find = (selector) => element.querySelector(selector);
const NAMES = { pre: "pre-contrast", flair: "FLAIR", post: "post-contrast" };
const SCORES = {
  dsc: "DSC", iou: "IoU", precision: "precision", recall: "recall",
  hd95_mm: "HD95, mm", hd95_px: "HD95, px", assd_mm: "ASSD, mm", assd_px: "ASSD, px",
};
let shown = null;

function show(name) {
  for (const part of ["hint", "busy", "error", "result"]) find("." + part).hidden = part !== name;
}

function update() {
  const value = props.value ? JSON.parse(props.value) : {};
  if (value.error) {
    find(".error").textContent = value.error;
    show("error");
  } else if (value.waiting !== undefined) {
    find(".busy span").textContent = value.waiting;
    if (value.done) find("progress").value = value.done;
    else find("progress").removeAttribute("value");
    show("busy");
  } else if (value.slices) {
    present(value);
    show("result");
  } else show("hint");
}

function present(value) {
  shown = value;
  const { summary, slices } = value;
  find("h2").textContent = summary.case;
  find(".numbers").textContent = numbers(summary);
  find("input[type=range]").max = slices.length - 1;
  find("input[type=range]").value = value.first;
  find(".sequences").replaceChildren(...Object.keys(NAMES).filter((n) => slices[0][n]).map(radio));
  find(".legend").textContent =
    "Outlined in red: what the network found" + (summary.scores ? "; in green: the true mask." : ".");
  find(".links").replaceChildren(...Object.entries(value.downloads).map(([name, url]) => {
    const link = Object.assign(document.createElement("a"), { href: url, download: name });
    link.textContent = name;
    return link;
  }));
  find(".scores").replaceChildren(...Object.entries(SCORES).filter(([name]) =>
    summary.scores?.[name] !== undefined).map(([name, title]) => {
    const row = document.createElement("tr"), score = summary.scores[name];
    row.insertCell().textContent = title;
    row.insertCell().textContent = score === null ? "not defined" : score.toFixed(3);
    return row;
  }));
  find(".montage").src = value.montage;
  find(".film").src = value.film;
  draw();
}

function numbers(summary) {
  const touched = summary.slices_touched;
  const size = `${summary.lesion_voxels} voxels`;
  const lesion = summary.lesion_ml === null ? size : `${summary.lesion_ml.toFixed(2)} ml (${size})`;
  const where = `on ${touched.length} of ${summary.shape[0]} slices, ${touched[0]} to ${touched.at(-1)}`;
  const found = touched.length ? `Lesion: ${lesion} ${where}.` : "No lesion was found.";
  return [found, ...summary.notes].join(" ");
}

function radio(name) {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "sequence", value: name, checked: name === "flair" });
  label.append(input, NAMES[name]);
  return label;
}

async function pixels(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

async function draw() {
  const value = shown, index = Number(find("input[type=range]").value);
  const sequence = find(".sequences input:checked").value;
  const { outline, heat } = Object.fromEntries(
    ["outline", "heat"].map((name) => [name, find(`input[name=${name}]`).checked]));
  find("output").textContent = `slice ${index + value.numbers[0]} of ${value.numbers.at(-1)}`;
  const slice = value.slices[index];
  const [picture, overlay] = await Promise.all([pixels(slice[sequence]), pixels(slice.overlay)]);
  if (value !== shown || index !== Number(find("input[type=range]").value)) return; // moved on
  paint(picture, overlay, outline, heat);
  const canvas = find("canvas");
  Object.assign(canvas, { width: picture.width, height: picture.height });
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// The overlay's red is the probability, its green the mask, its blue the true mask.
function paint(picture, overlay, outline, heat) {
  const { width, height, data } = picture, over = overlay.data;
  const isIn = (x, y, c) => x >= 0 && y >= 0 && x < width && y < height && over[4 * (y * width + x) + c];
  const isEdge = (x, y, c) => isIn(x, y, c) &&
    !(isIn(x - 1, y, c) && isIn(x + 1, y, c) && isIn(x, y - 1, c) && isIn(x, y + 1, c));
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const at = 4 * (y * width + x);
    if (heat) {
      const share = 0.7 * over[at] / 255;
      [255, 190, 0].forEach((c, k) => { data[at + k] += (c - data[at + k]) * share; });
    }
    if (outline && isEdge(x, y, 2)) data.set([0, 255, 0], at);
    if (outline && isEdge(x, y, 1)) data.set([255, 0, 0], at);
  }
}

element.addEventListener("input", () => shown && draw());
watch("value", update);
update();
