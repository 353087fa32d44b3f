// The viewer: three planes and a rendering of one scan, drawn by NiiVue.
const form = document.querySelector("#look"), canvas = form.querySelector("canvas");
const MEASURING = 2, PAN = 3, CROSSHAIR = 8, WINDOWING = 9, ALL = 3, RENDERING = 4; // as NiiVue numbers them
// Left, top, width and height of axial, coronal and sagittal plane and rendering, on a laptop and on a phone.
const WIDE = [[0, 0, 0.5, 1], [0.5, 0, 0.25, 0.5], [0.75, 0, 0.25, 0.5], [0.5, 0.5, 0.5, 0.5]];
const TALL = [[0, 0, 1, 0.6], [0, 0.6, 1 / 3, 0.4], [1 / 3, 0.6, 1 / 3, 0.4], [2 / 3, 0.6, 1 / 3, 0.4]];
const LABELS = { R: [0, 255, 53, 255], G: [0, 74, 208, 210], B: [0, 61, 79, 60], A: [0, 255, 255, 255] };
const FILL = 0.35, UNSEEN = 0.004; // opacities of the mask within its outline
const YELLOW = [1, 0.85, 0.25, 1], SIDES = [["L", "R"], ["P", "A"], ["I", "S"]];
let nv, files, measures, at, said, due; // NiiVue, what is shown, whether its size is known, the voxel at the crosshair, the values there, the next frame

async function start() {
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error("WebGL2 is missing or turned off in this browser");
  const { Niivue, NVImage } = await import("./vendor/niivue.js");
  nv = new Niivue({
    logLevel: "error", dragAndDropEnabled: false, isRadiologicalConvention: true, sagittalNoseLeft: true, viewModeHotKey: "", smoothDrawing: 2,
    crosshairColor: [0.3, 0.65, 1, 0.8], crosshairWidth: 0.7, crosshairGap: 6, fontColor: [0.75, 0.8, 0.85, 1],
    rulerColor: YELLOW, measureLineColor: YELLOW, measureTextColor: YELLOW, rulerWidth: 3,
  });
  nv.image = NVImage;
  nv.onLocationChange = ({ vox, values }) => { at = vox; tell(values); };
  nv.onIntensityChange = ({ cal_min, cal_max }) => {
    form.level.value = (cal_min + cal_max) / 2;
    form.window.value = cal_max - cal_min;
  };
  const drawScene = nv.drawScene;
  nv.drawScene = () => { // once a frame, however much has changed
    due ??= requestAnimationFrame(() => { due = undefined; drawScene.call(nv); });
  };
  const draw = nv.drawImage3D; // the rendering has no outline: it shows the mask whenever it is on
  nv.drawImage3D = function (...args) {
    const opacity = this.drawOpacity;
    this.drawOpacity = form.marks.value === "off" ? 0 : 1;
    draw.apply(this, args);
    this.drawOpacity = opacity;
  };
  canvas.addEventListener("keydown", key, true); // before NiiVue's own keys
  canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
    const place = nv.canvasPos2frac([offsetX * nv.uiData.dpr, offsetY * nv.uiData.dpr]);
    under(place[0] < 0 ? nv.scene.crosshairPos : place);
  });
  canvas.addEventListener("pointerleave", () => under(nv.scene.crosshairPos));
  await nv.attachToCanvas(canvas);
  form.addEventListener("input", ({ target }) => set[target.name](target));
  form.addEventListener("reset", () => setTimeout(reset));
  window.addEventListener("resize", () => set.view(form.view));
}

export async function look(viewer, names, summary) {
  if (!nv) await start();
  files = viewer;
  measures = Boolean(summary.spacing);
  for (const part of form.querySelectorAll("#ruler, .measuring")) part.hidden = !measures;
  for (const volume of [...nv.volumes]) nv.removeVolume(volume);
  const open = (name, options) => nv.image.loadFromBase64({ base64: viewer[name], name: `${name}.nii.gz`, ...options });
  nv.addVolume(await open("scan"));
  nv.addVolume(await open("probability", { colormap: "hot", opacity: 0, cal_min: 13, cal_max: 255 }));
  nv.loadDrawing(await open("labels"));
  nv.setDrawColormap(LABELS);
  form.querySelector("#sequences").innerHTML = "<legend>Sequence</legend>" + viewer.sequences.map((name, k) =>
    `<label><input type="radio" name="sequence" value="${k}" ${k ? "" : "checked"}>${names[name]}</label>`).join("");
  let legend = '<span class="mask">mask</span>';
  if (summary.scores) legend = '<span class="both">both masks</span><span class="mask">network only</span><span class="truth">true mask only</span>';
  form.querySelector("#legend").innerHTML = legend + '<span class="heat">probability, 0 to 1</span>';
  form.querySelector("#components").textContent = viewer.components.length ? "Go to component" : "";
  viewer.components.forEach(({ ml, voxels, slice, focus }, k) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const size = ml === null ? `${voxels} voxels` : `${ml.toFixed(2)} ml`;
    button.textContent = `${k + 1}: ${size}, slice ${slice}`;
    button.addEventListener("click", () => go(focus));
    form.querySelector("#components").append(button);
  });
  reset();
}

const set = {
  view({ value }) {
    nv.setSliceType(Number(value));
    if (Number(value) === ALL) nv.setCustomLayout([0, 1, 2, RENDERING].map((sliceType, k) =>
      ({ sliceType, position: canvas.clientWidth > canvas.clientHeight ? WIDE[k] : TALL[k] })));
    else nv.clearCustomLayout();
    tell();
  },
  sequence: ({ value }) => nv.setFrame4D(nv.volumes[0].id, Number(value)),
  probability: ({ checked }) => nv.setOpacity(1, checked ? 0.5 : 0),
  marks({ value }) {
    nv.drawOpacity = { outline: UNSEEN, fill: FILL, off: 0 }[value];
    nv.drawRimOpacity = 1;
    nv.drawScene();
  },
  ruler({ checked }) {
    const primary = checked ? MEASURING : CROSSHAIR;
    nv.setMouseEventConfig({ leftButton: { primary }, rightButton: WINDOWING, centerButton: PAN });
    nv.setTouchEventConfig({ singleTouch: primary, doubleTouch: PAN });
    if (!checked) nv.clearAllMeasurements();
  },
  slice({ value }) {
    const step = [0, 0, 0];
    step[axis()] = value - at[axis()];
    nv.moveCrosshairInVox(...step);
  },
  level() {
    const level = Number(form.level.value), half = form.window.value / 2;
    Object.assign(nv.volumes[0], { cal_min: level - half, cal_max: level + half });
    nv.updateGLVolume();
  },
  window: () => set.level(),
  zoom({ value }) { // centred on the crosshair
    const pan = nv.scene.pan2Dxyzmm, centre = nv.frac2mm(nv.scene.crosshairPos), more = value - pan[3];
    nv.setPan2Dxyzmm([0, 1, 2].map((k) => pan[k] - more * centre[k]).concat(Number(value)));
    nv.setScale(1.4 * value);
  },
};

function reset() {
  go(files.focus);
  nv.setPan2Dxyzmm([0, 0, 0, 1]);
  nv.setRenderAzimuthElevation(200, 15);
  for (const name of ["view", "sequence", "marks", "probability", "ruler", "level", "zoom"]) set[name](form[name]);
}

// Put the crosshair at a place in mm.
function go(place) {
  nv.scene.crosshairPos = nv.mm2frac(place);
  nv.createOnLocationChange();
  nv.drawScene();
}

// Say where a place of the volume is.
function under(place) {
  const far = nv.frac2mm(place).slice(0, 3), text = [...far].map((mm, k) => `${SIDES[k][Number(mm >= 0)]} ${Math.abs(mm).toFixed(1)}`);
  form.querySelector("#under").textContent = measures ? `${text.join(", ")} mm` : "";
}

// The axis that the slider moves along: that of the plane shown, else the axial one.
function axis() {
  return { 1: 1, 2: 0 }[form.view.value] ?? 2;
}

function tell(values = said) {
  const k = axis(), slices = nv.volumes[0].dimsRAS[k + 1];
  Object.assign(form.slice, { max: slices - 1, value: at[k] });
  const slice = k === 2 ? `${files.numbers[at[2]]} of ${files.numbers.at(-1)}` : `${at[k] + 1} of ${slices}`;
  form.querySelector("output").textContent = `Slice ${slice}, probability ${(values[1].value / 255).toFixed(2)}`;
  said = values;
  under(nv.scene.crosshairPos);
}

function key(event) {
  const turn = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] }[event.key];
  if (!turn) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  if (Number(form.view.value) === RENDERING) {
    nv.setRenderAzimuthElevation(nv.scene.renderAzimuth + 10 * turn[0], nv.scene.renderElevation + 10 * turn[1]);
  } else {
    form.slice.value = Number(form.slice.value) + turn[0] + turn[1];
    set.slice(form.slice);
  }
}
