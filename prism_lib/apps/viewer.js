// The pictures of the explorer under one zoom: original and counterfactual in the large one, difference and mask in the
// small ones. What a person does here reaches Python as the trait `box` and as the message {step: -1 or 1}.

const LINE = "#ffb000"; // orange of the colour-blind safe palette: seen on black and on white
const LAYERS = ["before", "after", "difference", "mask"];
const CRISP = 6; // screen pixels an image pixel from which on it is drawn as a square
const MAX_ZOOM = 32;
const HELP =
  "Click the picture first. C: swap original and counterfactual. ← →: earlier and later results. " +
  "+ − 0 or the wheel: zoom. Z: zoom in on a region. M: draw a rectangle as mask. Drag, or Shift and arrows: move.";

const between = (low, value, high) => Math.min(Math.max(value, low), high);

function make(tag, parent, properties) {
  const made = Object.assign(document.createElement(tag), properties);
  parent.append(made);
  return made;
}

function render({ model, el }) {
  let images = {}, share = 1, zoom = 1, x = 0.5, y = 0.5; // the centre, in shares of the image
  let tool = "", drag = null, request = 0;
  el.classList.add("prism-viewer");
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // else JupyterLab copies the cell at C, and so on

  const row = (parent) => make("div", parent, { className: "prism-row" });
  const button = (parent, textContent, title, onclick) =>
    make("button", parent, { type: "button", className: "jupyter-widgets jupyter-button", textContent, title, onclick });
  const picture = (parent) =>
    [make("div", parent, { className: "prism-note" }), make("canvas", parent, { className: "prism-picture" })];

  const views = make("div", el, { className: "prism-views" });
  const column = make("div", views, { className: "prism-large" });
  const tools = row(column);
  const [zoomed, masked] = [["zoom", "Zoom to region", "drag over a part of the picture (Z)"],
    ["mask", "Draw rectangle", "drag over the part in which the edit may show (M)"]].map(([name, text, title]) =>
    Object.assign(button(tools, text, title, () => choose(name)), { name }));
  button(tools, "+", "zoom in", () => zoomBy(1.5)).ariaLabel = "zoom in";
  button(tools, "−", "zoom out", () => zoomBy(1 / 1.5)).ariaLabel = "zoom out";
  button(tools, "Fit", "the whole image (0)", whole);
  const names = make("div", column, { className: "prism-names" });
  const [left, right] = [make("b", names), make("b", names)];
  const large = make("canvas", column, { className: "prism-picture", tabIndex: 0 });
  large.setAttribute("role", "img");
  const sliding = row(column);
  make("span", sliding, { textContent: "original" });
  const about = "from the original to the counterfactual";
  const slider = make("input", sliding, { type: "range", min: 0, max: 1, step: 0.01, value: 1, title: about });
  make("span", sliding, { textContent: "counterfactual" });
  const mode = make("select", sliding, { title: "draw a curtain over the original, or cross-fade" });
  for (const text of ["curtain", "fade"]) make("option", mode, { textContent: text });
  const results = row(column);
  const compare = button(results, "Compare", "swap original and counterfactual (C)", swap);
  const earlier = button(results, "◀", "the result before (left arrow)", () => step(-1));
  const place = make("span", results, { className: "prism-note" });
  const later = button(results, "▶", "the result after (right arrow)", () => step(1));
  [earlier.ariaLabel, later.ariaLabel] = ["earlier result", "later result"];
  const about_png = "download original, counterfactual and difference side by side as one PNG";
  const exporting = button(results, "Export PNG", about_png, download);
  make("div", column, { className: "prism-note prism-help", textContent: HELP });
  const side = make("div", views, { className: "prism-small" });
  const [legend, difference] = picture(make("div", side)), [area, mask] = picture(make("div", side));
  legend.textContent = "difference: red is brighter, blue darker";

  async function load() {
    const number = ++request, made = {};
    for (const name of LAYERS) {
      const bytes = model.get(name);
      if (bytes?.byteLength) made[name] = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    }
    if (number !== request) return; // newer pictures are on their way
    Object.values(images).forEach((old) => old.close());
    images = made;
    if (share === 0) share = 1; // a new result is shown, not hidden behind the original
    draw();
  }

  function draw() {
    const { before, after } = images, shown = after ? share : 0;
    if (!before) return;
    paint(large, [[before, 1], ...(after ? [[after, shown]] : [])], true);
    paint(difference, images.difference ? [[images.difference, 1]] : [], false);
    paint(mask, [[images.mask, 1]], true);
    const part = after && shown > 0 && shown < 1, fading = part && mode.value === "fade";
    const now = shown ? "counterfactual (generated)" : "original";
    left.textContent = fading ? `${Math.round(100 * shown)} % ${now}` : now;
    right.textContent = part && !fading ? "original" : zoom > 1 ? `${zoom.toFixed(1)} ×` : "";
    large.ariaLabel = `${left.textContent}. ${HELP}`;
    slider.value = share;
    const [number, count] = model.get("place");
    const next = model.get("box").length ? "frame: where the next edit may show" : "";
    const said = [after ? "blue: where the edit may show" : "", next].filter(Boolean);
    area.textContent = said.join("; ") || "where the edit may show";
    place.textContent = number ? `result ${number} of ${count}` : count ? `${count} earlier` : "no result yet";
    earlier.disabled = !count || number === 1;
    later.disabled = !number || number === count;
    compare.disabled = slider.disabled = mode.disabled = exporting.disabled = !after;
    for (const each of [zoomed, masked]) each.classList.toggle("mod-active", each.name === tool);
    large.style.cursor = tool ? "crosshair" : zoom > 1 ? "grab" : "default";
  }

  function paint(canvas, layers, framed) {
    const { width, height } = images.before, pen = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round((canvas.width * height) / width);
    const scale = (canvas.width * zoom) / width;
    const [dx, dy] = [(x - 0.5 / zoom) * width * scale, (y - 0.5 / zoom) * height * scale];
    pen.imageSmoothingEnabled = scale / ratio < CRISP;
    pen.imageSmoothingQuality = "high";
    for (const [image, part] of layers) {
      pen.save();
      if (mode.value === "fade") pen.globalAlpha = part;
      else pen.beginPath(), pen.rect(0, 0, part * canvas.width, canvas.height), pen.clip();
      pen.drawImage(image, -dx, -dy, image.width * scale, image.height * scale);
      pen.restore();
      if (mode.value !== "fade" && part > 0 && part < 1) {
        pen.fillStyle = LINE;
        pen.fillRect(part * canvas.width - ratio, 0, 2 * ratio, canvas.height);
      }
    }
    const outline = ([top, start, bottom, end]) =>
      pen.strokeRect(start * scale - dx, top * scale - dy, (end - start) * scale, (bottom - top) * scale);
    [pen.strokeStyle, pen.lineWidth] = [LINE, 2 * ratio];
    if (framed && model.get("box").length) outline(model.get("box"));
    pen.setLineDash([6 * ratio, 4 * ratio]);
    if (framed && drag?.area) outline(pixels(drag.area));
  }

  // A rectangle (top, left, bottom, right) in whole pixels of the image, from shares of it.
  function pixels([top, start, bottom, end]) {
    const { width, height } = images.before;
    return [Math.floor(top * height), Math.floor(start * width), Math.ceil(bottom * height), Math.ceil(end * width)];
  }

  function look(newZoom, newX, newY) {
    zoom = between(1, newZoom, MAX_ZOOM);
    [x, y] = [newX, newY].map((centre) => between(0.5 / zoom, centre, 1 - 0.5 / zoom));
    draw();
  }

  function zoomBy(factor, px = 0.5, py = 0.5) { // the point that lies at these shares of the view stays there
    const next = between(1, zoom * factor, MAX_ZOOM);
    look(next, x + (px - 0.5) * (1 / zoom - 1 / next), y + (py - 0.5) * (1 / zoom - 1 / next));
  }

  function whole() { look(1, 0.5, 0.5); }
  function choose(name) { tool = tool === name ? "" : name; large.focus({ preventScroll: true }); draw(); }
  function swap() { if (images.after) { share = share > 0 ? 0 : 1; draw(); } }
  function step(by) { model.send({ step: by }); }

  function point(event) { // shares of the view
    const frame = large.getBoundingClientRect();
    return [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
  }

  large.onpointerdown = (event) => {
    if (event.button) return;
    large.focus({ preventScroll: true });
    large.setPointerCapture(event.pointerId);
    drag = { from: point(event), x, y };
  };
  large.onpointermove = (event) => {
    if (!drag) return;
    const [px, py] = point(event), [fromX, fromY] = drag.from;
    if (!tool) return look(zoom, drag.x - (px - fromX) / zoom, drag.y - (py - fromY) / zoom);
    const over = (centre, one, other) =>
      [Math.min(one, other), Math.max(one, other)].map((at) => between(0, centre + (at - 0.5) / zoom, 1));
    const [[start, end], [top, bottom]] = [over(x, fromX, px), over(y, fromY, py)];
    const large_enough = Math.min(end - start, bottom - top) * zoom > 0.01; // else it was a click
    drag.area = large_enough ? [top, start, bottom, end] : null;
    draw();
  };
  large.onpointerup = () => {
    const dragged = drag?.area, used = tool;
    drag = null;
    if (!dragged) return;
    tool = "";
    const [top, start, bottom, end] = dragged;
    const side = Math.max(end - start, bottom - top);
    if (used === "zoom") return look(1 / side, (start + end) / 2, (top + bottom) / 2);
    model.set("box", pixels(dragged));
    model.save_changes();
    draw();
  };
  large.onpointercancel = () => { drag = null; draw(); };
  large.ondblclick = whole;
  large.addEventListener("wheel", (event) => {
    if (document.activeElement !== large && !event.ctrlKey) return; // the page scrolls
    event.preventDefault();
    zoomBy(Math.exp(-0.002 * event.deltaY), ...point(event));
  }, { passive: false });
  slider.oninput = () => { share = Number(slider.value); draw(); };
  mode.onchange = draw;

  const move = (dx, dy) => look(zoom, x + (0.2 * dx) / zoom, y + (0.2 * dy) / zoom);
  const keys = {
    c: swap, z: () => choose("zoom"), m: () => choose("mask"), "+": () => zoomBy(1.5), "=": () => zoomBy(1.5),
    "-": () => zoomBy(1 / 1.5), 0: whole, arrowleft: () => step(-1), arrowright: () => step(1),
    "shift arrowleft": () => move(-1, 0), "shift arrowright": () => move(1, 0), "shift arrowup": () => move(0, -1),
    "shift arrowdown": () => move(0, 1), escape: () => { tool = ""; drag = null; draw(); },
  };
  el.onkeydown = (event) => {
    const name = event.key.toLowerCase(), shifted = event.shiftKey && name.startsWith("arrow");
    const act = keys[shifted ? `shift ${name}` : name];
    const typed = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (!act || typed || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  };

  function download() {
    const { width, height } = images.before, scale = Math.ceil(512 / width), gap = 8, head = 30, foot = 52;
    const panels = [["original", "before"], ["counterfactual (generated)", "after"],
      ["difference: red is brighter, blue darker", "difference"]];
    const sheet = document.createElement("canvas"), pen = sheet.getContext("2d");
    sheet.width = 3 * width * scale + 2 * gap;
    sheet.height = head + height * scale + foot;
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, sheet.width, sheet.height);
    pen.imageSmoothingEnabled = false;
    pen.fillStyle = "#000";
    pen.font = "18px sans-serif";
    panels.forEach(([name, layer], k) => {
      pen.fillText(name, k * (width * scale + gap), 21);
      pen.drawImage(images[layer], k * (width * scale + gap), head, width * scale, height * scale);
    });
    const title = model.get("title"), below = head + height * scale;
    pen.fillText(title, 0, below + 21, sheet.width);
    pen.fillText("The counterfactual was generated by a model. For research, not for clinical use.", 0, below + 44);
    sheet.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = `${title.replace(/[^A-Za-z0-9]+/g, "-").slice(0, 80)}.png`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    });
  }

  for (const name of [...LAYERS, "place"]) model.on(`change:${name}`, load);
  model.on("change:before", whole); // another image
  model.on("change:box", draw);
  const observer = new ResizeObserver(draw);
  observer.observe(large);
  load();
  return () => observer.disconnect();
}

export default { render };
