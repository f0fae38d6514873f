// The page of `canopy serve`, live and exported. Heights arrive as numbers (terrarium PNGs, see
// canopy/viewer/tiles.py), so colours change without a request and an exported page can tell heights too.
"use strict";
const byId = (id) => document.getElementById(id);
const TILE = 256;
let config, map, layers = [], bases = {}, photo = null, sides = [null, null], split = 0.5;

/** An element with properties and children; texts are set as text, since names of files are anybody's. */
function el(tag, props, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

/** A text as HTML, for Leaflet's attributions. */
const plain = (text) => el("span", { textContent: text }).innerHTML;

let hiding;
function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { byId("message").hidden = true; }, 8000);
}

// ---- heights ----------------------------------------------------------------------------------
const kept = new Map();

/** Float32Array of 256 x 256 metres, NaN where there is none. The latest 300 tiles are kept. */
function heightsOf(url) {
  if (!kept.has(url)) {
    const coming = decoded(url);
    kept.set(url, coming);
    coming.catch(() => kept.delete(url));
    if (kept.size > 300) kept.delete(kept.keys().next().value);
  }
  return kept.get(url);
}

async function decoded(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(await reasonOf(answer));
  // As stored: neither alpha nor a colour profile may touch the numbers.
  const options = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const picture = await createImageBitmap(await answer.blob(), options);
  const context = el("canvas", { width: TILE, height: TILE }).getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const rgba = context.getImageData(0, 0, TILE, TILE).data;
  return Float32Array.from({ length: TILE * TILE }, (_, i) => (
    rgba[4 * i + 3] ? rgba[4 * i] * 256 + rgba[4 * i + 1] + rgba[4 * i + 2] / 256 - 32768 : NaN));
}

async function reasonOf(answer) {
  try { return (await answer.json()).error; } catch { return `${answer.status} ${answer.statusText}`; }
}

const HeightTiles = L.GridLayer.extend({
  url(coords) { return `heights/${this.options.number}/${coords.z}/${coords.x}/${coords.y}.png`; },
  createTile(coords, done) {
    const canvas = el("canvas", { width: TILE, height: TILE, className: "tile" });
    heightsOf(this.url(coords)).then((heights) => {
      canvas.heights = heights;
      paint(canvas);
      done(null, canvas);
    }, (error) => { say(error.message); done(error, canvas); });
    return canvas;
  },
  repaint() { for (const tile of Object.values(this._tiles)) if (tile.el.heights) paint(tile.el); },
});

function paint(canvas) {
  const context = canvas.getContext("2d"), pixels = context.createImageData(TILE, TILE);
  const { low, high, hide, colours } = range, last = colours.length - 1;
  canvas.heights.forEach((height, i) => {
    if (Number.isNaN(height) || (hide && height < low)) return;
    const share = Math.min(Math.max((height - low) / (high - low), 0), 1);
    pixels.data.set(colours[Math.round(share * last)], 4 * i);
    pixels.data[4 * i + 3] = 255;
  });
  context.putImageData(pixels, 0, 0);
}

/** Heights at points from the finest tiles: what an exported page answers with. */
async function fromTiles(layer, points) {
  const zoom = layer.about.max_zoom;
  return Promise.all(points.map(async ([lng, lat]) => {
    const [w, s, e, n] = layer.about.bounds;
    if (lng < w || lng > e || lat < s || lat > n) return null;
    const at = map.project([lat, lng], zoom), x = Math.floor(at.x / TILE), y = Math.floor(at.y / TILE);
    const heights = await heightsOf(layer.tiles.url({ z: zoom, x, y }));
    const height = heights[(Math.floor(at.y) - y * TILE) * TILE + Math.floor(at.x) - x * TILE];
    return Number.isNaN(height) ? null : height;
  }));
}

async function ask(what, points) {
  const answer = await fetch(what, { method: "POST", body: JSON.stringify(points) });
  if (!answer.ok) throw new Error(await reasonOf(answer));
  return answer.json();
}

// ---- colours ----------------------------------------------------------------------------------
const range = { low: 0, high: 40, hide: false, colours: [] };

function setRange() {
  const low = Number(byId("low").value), high = Math.max(Number(byId("high").value), low + 1);
  Object.assign(range, { low, high, hide: byId("hide").checked });
  byId("low-m").textContent = `${low} m`;
  byId("high-m").textContent = `${high} m`;
  const step = [1, 2, 5, 10, 20].find((size) => (high - low) / size <= 5), ticks = [low];
  for (let at = (Math.floor(low / step) + 1) * step; at < high - step / 3; at += step) {
    if (at > low + step / 3) ticks.push(at);
  }
  ticks.push(high);
  byId("ticks").replaceChildren(...ticks.map((at) => {
    const tick = el("span", { textContent: at === high ? `${at}+` : at });
    tick.style.left = `${100 * (at - low) / (high - low)}%`;
    return tick;
  }));
  layers.forEach((layer) => layer.tiles.repaint());
}

// ---- what is shown, and the swipe -------------------------------------------------------------
function views() {
  const found = layers.map((layer) => ({ name: layer.about.name, sides: [layer, layer] }));
  if (layers.length > 1) {
    found.unshift({ name: `Swipe: ${layers[0].about.name} | ${layers[1].about.name}`, sides: layers });
  }
  for (const layer of config.image || config.base ? layers : []) {
    found.push({ name: `Swipe: ${layer.about.name} | image`, sides: [layer, null] });
  }
  if (config.image || config.base) found.push({ name: "Image only", sides: [null, null] });
  return found;
}

function show(view) {
  map.closePopup();
  sides = view.sides;
  for (const layer of layers) {
    const wanted = sides.includes(layer);
    if (wanted !== map.hasLayer(layer.tiles)) (wanted ? map.addLayer : map.removeLayer).call(map, layer.tiles);
  }
  byId("divider").hidden = sides[0] === sides[1];
  document.querySelectorAll("#divider .side").forEach((label, i) => {
    label.textContent = sides[i] ? sides[i].about.name : "image";
  });
  clip();
}

function clip() {
  const size = map.getSize(), at = Math.round(split * size.x);
  byId("divider").style.left = `${at}px`;
  byId("handle").setAttribute("aria-valuenow", Math.round(100 * split));
  const corner = map.containerPointToLayerPoint([0, 0]);
  layers.forEach((layer) => {
    const box = layer.tiles.getContainer();
    if (!box) return;
    const left = sides[0] === layer ? 0 : at, right = sides[1] === layer ? size.x : at;
    box.style.clip = sides[0] === sides[1] ? "" : `rect(${corner.y}px, ${corner.x + right}px, ${
      corner.y + size.y}px, ${corner.x + left}px)`;
  });
}

function startSwipe() {
  const handle = byId("handle");
  byId("divider").append(el("span", { className: "side left" }), el("span", { className: "side right" }));
  const move = (x) => { split = Math.min(Math.max(x / map.getSize().x, 0), 1); clip(); };
  handle.addEventListener("pointerdown", (event) => { handle.setPointerCapture(event.pointerId); });
  handle.addEventListener("pointermove", (event) => {
    if (handle.hasPointerCapture(event.pointerId)) move(event.clientX - map.getContainer().getBoundingClientRect().left);
  });
  handle.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
    if (step) move((split + step) * map.getSize().x);
  });
  map.on("move zoomend resize viewreset", clip);
}

// ---- a click ----------------------------------------------------------------------------------
async function tell(latlng) {
  const point = [latlng.lng, latlng.lat];
  let found;
  if (config.static) {
    found = await Promise.all(layers.map(async (layer) => ({
      name: layer.about.name, height_m: (await fromTiles(layer, [point]))[0],
    })));
  } else {
    found = await ask("point", [point]);
  }
  const box = el("div", { id: "answer" });
  for (const one of found) {
    const known = one.height_m !== null;
    box.append(el("div", { className: "name", textContent: one.name }));
    box.append(el("div", { className: "height", textContent: known ? `${one.height_m.toFixed(2)} m` : "no height here" }));
    if (one.level && known) {
      const ends = `${one.lower_m.toFixed(2)} to ${one.upper_m.toFixed(2)} m`;
      box.append(el("div", { className: "interval", textContent: `${ends} (${Math.round(100 * one.level)} % interval)` }));
    }
    if (one.date) box.append(el("div", { className: "date", textContent: `image of ${one.date}` }));
    if (one.quality) {
      const text = one.quality.length ? `flags: ${one.quality.join(", ")}` : "no quality flags";
      box.append(el("div", { className: "quality", textContent: text }));
    }
  }
  box.append(el("div", { className: "name", textContent: `${latlng.lat.toFixed(6)}, ${latlng.lng.toFixed(6)}` }));
  L.popup({ maxWidth: 300 }).setLatLng(latlng).setContent(box).openOn(map);
}

// ---- drawing ----------------------------------------------------------------------------------
let tool = null, corners = [], sketch = null, dot = null;
const HINTS = {
  line: "Click along a line; double-click or Enter ends it, Escape gives up.",
  zone: "Click the corners; double-click or Enter closes the polygon, Escape gives up.",
  "": "Click the map for a height.",
};

function setTool(name) {
  tool = name;
  for (const id of ["line", "zone"]) byId(id).classList.toggle("active", id === name);
  byId("hint").textContent = HINTS[name || ""];
  map.getContainer().classList.toggle("leaflet-crosshair", Boolean(name));
  map.doubleClickZoom[name ? "disable" : "enable"]();
  if (name) clear();
}

function clear() {
  [sketch, dot].forEach((drawn) => drawn && drawn.remove());
  sketch = dot = null;
  corners = [];
  map.closePopup();
  byId("result").hidden = true;
  byId("clear").hidden = true;
}

function draw(pointer) {
  const points = pointer ? [...corners, pointer] : corners;
  if (sketch) sketch.remove();
  const style = { color: "#fff", weight: 3, fill: false, interactive: false };
  sketch = (tool === "zone" ? L.polygon : L.polyline)(points, style).addTo(map);
}

async function finish() {
  const name = tool, least = name === "zone" ? 3 : 2;
  const points = corners.filter((at, i) => !i || !at.equals(corners[i - 1], 1e-9));
  if (points.length < least) return say(`at least ${least} points`);
  corners = points;
  draw();
  setToolDone();
  const asked = corners.map((at) => [at.lng, at.lat]);
  byId("result").hidden = byId("clear").hidden = false;
  byId("result").replaceChildren(el("p", { textContent: "reading ..." }));
  if (name === "zone") showZone(await ask("zone", asked));
  else showProfile(config.static ? await profileFromTiles() : await ask("profile", asked));
}

function setToolDone() {
  tool = null;
  byId("line").classList.remove("active");
  byId("zone").classList.remove("active");
  byId("hint").textContent = HINTS[""];
  map.getContainer().classList.remove("leaflet-crosshair");
  setTimeout(() => map.doubleClickZoom.enable(), 300);
}

async function profileFromTiles() {
  const along = [0];
  for (let i = 1; i < corners.length; i++) along.push(along[i - 1] + corners[i - 1].distanceTo(corners[i]));
  const m = Array.from({ length: 300 }, (_, i) => along.at(-1) * i / 299);
  const points = m.map((at) => {
    const i = Math.max(along.findIndex((end) => end >= at), 1), a = corners[i - 1], b = corners[i];
    const share = (at - along[i - 1]) / (along[i] - along[i - 1] || 1);
    return [a.lng + share * (b.lng - a.lng), a.lat + share * (b.lat - a.lat)];
  });
  const heights = await Promise.all(layers.map((layer) => fromTiles(layer, points)));
  return { m, lon: points.map((at) => at[0]), lat: points.map((at) => at[1]), heights_m: heights };
}

// ---- answers ----------------------------------------------------------------------------------
function showZone(zones) {
  const number = (value, unit, digits = 2) => (value === null ? "–" : `${value.toFixed(digits)}${unit}`);
  const rows = [["area", (z) => number(z.area_ha, " ha", 3)], ["with heights", (z) => number(100 * z.valid_share, " %", 1)]];
  rows.push(["mean height", (z) => number(z.mean_m, " m")]);
  for (const key of Object.keys(zones[0])) {
    if (/^p\d+_m$/.test(key)) rows.push([`${Number(key.slice(1, -2))}th percentile`, (z) => number(z[key], " m")]);
  }
  rows.push(["highest", (z) => number(z.max_m, " m")]);
  for (const key of Object.keys(zones[0])) {
    if (/^cover_[\d.]+m$/.test(key)) {
      rows.push([`cover above ${key.slice(6, -1)} m`, (z) => number(z[key] === null ? null : 100 * z[key], " %", 1)]);
    }
  }
  rows.push(["pixels", (z) => z.n.toLocaleString("en")]);
  const body = rows.map(([name, text]) => el("tr", {}, el("th", { textContent: name }),
    ...zones.map((zone) => el("td", { textContent: text(zone) }))));
  const head = zones.length > 1 ? [el("thead", {}, el("tr", {}, el("th", {}),
    ...layers.map((layer) => el("th", { textContent: layer.about.name }))))] : [];
  byId("result").replaceChildren(el("h2", { textContent: "In the polygon" }),
    el("table", {}, ...head, el("tbody", {}, ...body)));
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** 1, 2 or 5 times a power of ten of which some four make up a length. */
function roundStep(length) {
  const power = 10 ** Math.floor(Math.log10(length / 4));
  return [1, 2, 5, 10].map((times) => times * power).find((step) => length / step <= 4.5);
}

function showProfile(profile) {
  const [width, height, left, right, top, bottom] = [284, 170, 30, 8, 10, 30];
  const far = profile.m.at(-1) || 1;
  const tallest = Math.max(1, ...profile.heights_m.flat().map((h) => h ?? 0));
  const rise = roundStep(tallest), high = rise * Math.ceil(tallest / rise);
  const x = (m) => left + (m / far) * (width - left - right), y = (h) => height - bottom - (h / high) * (height - top - bottom);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (let h = 0; h <= high; h += rise) {
    chart.append(svg("line", { x1: left, x2: width - right, y1: y(h), y2: y(h), stroke: "#e3e8e5" }));
    chart.append(svg("text", { x: left - 5, y: y(h) + 4, "text-anchor": "end" }, `${+h.toFixed(2)}`));
  }
  const stride = roundStep(far);
  for (let m = 0; m <= far; m += stride) {
    const label = +(far >= 2000 ? m / 1000 : m).toFixed(2);
    chart.append(svg("text", { x: x(m), y: height - bottom + 14, "text-anchor": m ? "middle" : "start" }, `${label}`));
  }
  chart.append(svg("text", { x: width - right, y: height - 3, "text-anchor": "end" }, far >= 2000 ? "height (m) over distance (km)" : "height (m) over distance (m)"));
  const names = layers.length > 1 ? ["a", "b"] : ["a"];
  profile.heights_m.forEach((heights, number) => {
    let path = "", pen = "M";
    heights.forEach((h, i) => {
      if (h === null) { pen = "M"; return; }
      path += `${pen}${x(profile.m[i]).toFixed(1)},${y(h).toFixed(1)}`;
      pen = "L";
    });
    chart.append(svg("path", { d: path, fill: "none", stroke: `var(--${names[number]})`, "stroke-width": 1.6 }));
  });
  const cursor = svg("line", { y1: top, y2: height - bottom, stroke: "#1d2a26", visibility: "hidden" });
  chart.append(cursor);
  const readout = el("p", { id: "readout" });
  const legend = layers.length > 1 ? [el("p", {}, ...layers.flatMap((layer, i) => [
    el("span", { className: names[i], textContent: `— ${layer.about.name} ` })]))] : [];
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect(), scale = width / box.width;
    const share = ((event.clientX - box.left) * scale - left) / (width - left - right);
    const i = Math.round(Math.min(Math.max(share, 0), 1) * (profile.m.length - 1));
    const heights = profile.heights_m.map((all) => (all[i] === null ? "no height" : `${all[i].toFixed(2)} m`));
    readout.textContent = `at ${profile.m[i].toFixed(0)} m: ${heights.join(" | ")}`;
    cursor.setAttribute("x1", x(profile.m[i]));
    cursor.setAttribute("x2", x(profile.m[i]));
    cursor.setAttribute("visibility", "visible");
    const at = [profile.lat[i], profile.lon[i]];
    dot = dot ? dot.setLatLng(at) : L.circleMarker(at, { radius: 6, color: "#fff", fillColor: "#1d2a26", fillOpacity: 1, weight: 2 }).addTo(map);
  });
  byId("result").replaceChildren(el("h2", { textContent: "Along the line" }), ...legend, chart, readout);
}

// ---- the beginning ----------------------------------------------------------------------------
function tilesOf(kind, about, pane, more) {
  const [w, s, e, n] = about.bounds;
  const make = kind === "image" ? (options) => L.tileLayer("image/{z}/{x}/{y}.webp", options) : (options) => new HeightTiles(options);
  return make({ pane, bounds: [[s, w], [n, e]], minNativeZoom: about.min_zoom, maxNativeZoom: about.max_zoom,
    maxZoom: 24, noWrap: true, ...more });
}

function addControls() {
  byId("title").textContent = layers.map((layer) => layer.about.name).join(" | ");
  document.title = `${byId("title").textContent} - canopy`;
  byId("about").append(...layers.flatMap((layer) => [
    ...(layers.length > 1 ? [el("b", { textContent: layer.about.name })] : []),
    ...layer.about.about.map((line) => el("div", { textContent: line }))]));
  byId("notes").append(...layers.flatMap((layer) => layer.about.notes.map((line) => el("div", { textContent: `Note: ${line}` }))));
  const choices = views();
  byId("view").append(...choices.map((view, i) => el("option", { value: i, textContent: view.name })));
  byId("view").onchange = () => show(choices[byId("view").value]);
  byId("base").append(el("option", { value: "", textContent: "none" }),
    ...config.bases.map((base) => el("option", { value: base.name, textContent: base.name })));
  byId("base").onchange = () => {
    Object.values(bases).forEach((base) => base.remove());
    if (bases[byId("base").value]) bases[byId("base").value].addTo(map);
  };
  byId("base").value = config.base || "";
  byId("base").onchange();
  byId("opacity").oninput = () => layers.forEach((layer) => layer.tiles.setOpacity(byId("opacity").value / 100));
  byId("low").value = 0;
  byId("high").value = config.top_m;
  for (const id of ["low", "high", "hide"]) byId(id).oninput = setRange;
  byId("bar").style.background = `linear-gradient(to right, ${config.ramp.join(", ")})`;
  byId("line").onclick = () => setTool("line");
  byId("zone").onclick = () => setTool("zone");
  byId("zone").hidden = config.static;
  byId("clear").onclick = clear;
  show(choices[0]);
  byId("opacity").oninput();
  setRange();
}

function addGestures() {
  const told = (error) => say(error.message);
  map.on("click", (event) => {
    if (!tool) { tell(event.latlng).catch(told); return; }
    corners.push(event.latlng);
    draw();
  });
  map.on("mousemove", (event) => { if (tool && corners.length) draw(event.latlng); });
  map.on("dblclick", () => { if (tool) finish().catch(told); });
  document.addEventListener("keydown", (event) => {
    if (tool && event.key === "Enter") { event.preventDefault(); finish().catch(told); }
    if (tool && event.key === "Escape") { clear(); setToolDone(); }
  });
}

async function start() {
  config = await (await fetch("config.json")).json();
  range.colours = config.ramp.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  map = L.map("map", { zoomControl: true, maxZoom: 22 });
  map.attributionControl.setPrefix("canopy · Leaflet");
  L.control.scale({ imperial: false, maxWidth: 140 }).addTo(map);
  const [w, s, e, n] = config.bounds;
  map.fitBounds([[s, w], [n, e]], { padding: [12, 12] });
  for (const [name, order] of [["base", 150], ["image", 250], ["heights", 350]]) map.createPane(name).style.zIndex = order;
  for (const base of config.bases) {
    bases[base.name] = L.tileLayer(base.template, { pane: "base", attribution: base.attribution, maxZoom: 22, maxNativeZoom: 19 });
  }
  if (config.image) {
    photo = tilesOf("image", config.image, "image", { attribution: `image: ${plain(config.image.name)}` }).addTo(map);
  }
  layers = config.layers.map((about, number) => ({
    about, tiles: tilesOf("heights", about, "heights", { number, attribution: number ? plain(about.by) : `heights: ${plain(about.by)}` }),
  }));
  const drawn = [...layers.map((layer) => layer.tiles), ...(photo ? [photo] : [])];
  const busy = () => map.getContainer().classList.toggle("busy", drawn.some((tiles) => map.hasLayer(tiles) && tiles.isLoading()));
  for (const tiles of drawn) tiles.on("loading load remove", busy);
  busy();
  startSwipe();
  addControls();
  addGestures();
  document.body.dataset.ready = "yes";
}

start().catch((error) => say(error.message));
