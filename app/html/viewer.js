(() => {
  "use strict";
  const root = document.getElementById("viewer");
  const source = document.getElementById("viewer-data");
  if (!root || !source) return;
  const data = JSON.parse(source.textContent);
  const size = data.shape;
  const at = data.start.slice();
  // Per plane: slice axis, column axis, row axis, whether rows are flipped, sides of the patient.
  const planes = {
    axial: { normal: 2, column: 0, row: 1, flip: false, sides: "RLAP" },
    coronal: { normal: 1, column: 0, row: 2, flip: true, sides: "RLSI" },
    sagittal: { normal: 0, column: 1, row: 2, flip: true, sides: "APSI" },
  };
  const names = ["background", "necrotic core", "oedema", "enhancing tumour"];
  const colours = [null, [240, 228, 66], [86, 180, 233], [255, 77, 77]];
  const regions = [
    { colour: "rgb(86 180 233)", codes: [1, 2, 3] },
    { colour: "rgb(240 228 66)", codes: [1, 3] },
    { colour: "rgb(255 77 77)", codes: [3] },
  ];
  const get = (name) => root.querySelector(`[data-control="${name}"]`);
  const volumes = {};
  const scale = Math.max(1, Math.round(420 / Math.max(...size)));

  async function decode(address) {
    const picture = new Image();
    picture.src = address;
    await picture.decode();
    const canvas = document.createElement("canvas");
    canvas.width = picture.naturalWidth;
    canvas.height = picture.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const [nx, ny, nz] = size;
    const volume = new Uint8Array(nx * ny * nz);
    for (let z = 0; z < nz; z++) {
      const left = (z % data.columns) * nx;
      const top = Math.floor(z / data.columns) * ny;
      for (let y = 0; y < ny; y++) {
        const from = (top + y) * canvas.width + left;
        for (let x = 0; x < nx; x++) volume[(z * ny + y) * nx + x] = pixels[4 * (from + x)];
      }
    }
    return volume;
  }

  const value = (volume, x, y, z) => volume[(z * size[1] + y) * size[0] + x];

  function slice(volume, plane) {
    const width = size[plane.column], height = size[plane.row];
    const out = new Uint8Array(width * height);
    const place = at.slice();
    for (let row = 0; row < height; row++) {
      place[plane.row] = plane.flip ? height - 1 - row : row;
      for (let column = 0; column < width; column++) {
        place[plane.column] = column;
        out[row * width + column] = value(volume, ...place);
      }
    }
    return out;
  }

  function layer(width, height, paint) {
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let i = 0; i < width * height; i++) image.data.set(paint(i), 4 * i);
    context.putImageData(image, 0, 0);
    return canvas;
  }

  function outline(context, codes, width, height, region) {
    const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && region.codes.includes(codes[y * width + x]);
    context.beginPath();
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        if (!inside(x, y)) continue;
        const left = x * scale, top = y * scale, right = left + scale, bottom = top + scale;
        if (!inside(x - 1, y)) { context.moveTo(left, top); context.lineTo(left, bottom); }
        if (!inside(x + 1, y)) { context.moveTo(right, top); context.lineTo(right, bottom); }
        if (!inside(x, y - 1)) { context.moveTo(left, top); context.lineTo(right, top); }
        if (!inside(x, y + 1)) { context.moveTo(left, bottom); context.lineTo(right, bottom); }
      }
    }
    context.lineCap = "round";
    context.strokeStyle = "#000";
    context.lineWidth = 4;
    context.stroke();
    context.strokeStyle = region.colour;
    context.lineWidth = 2;
    context.stroke();
  }

  function draw(name) {
    const plane = planes[name];
    const canvas = root.querySelector(`canvas[data-plane="${name}"]`);
    const width = size[plane.column], height = size[plane.row];
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    const grey = slice(volumes[get("contrast").value], plane);
    context.imageSmoothingEnabled = true;
    context.drawImage(layer(width, height, (i) => [grey[i], grey[i], grey[i], 255]), 0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = false;
    if (volumes.uncertainty && get("uncertainty").checked) {
      const unsure = slice(volumes.uncertainty, plane);
      const paint = (i) => [255, 140, 255, Math.round(0.8 * unsure[i])];
      context.drawImage(layer(width, height, paint), 0, 0, canvas.width, canvas.height);
    }
    const packed = slice(volumes.labels, plane).map((byte) => Math.round(byte / 16));
    if (get("prediction").checked) {
      const alpha = Math.round(2.55 * get("opacity").value);
      const paint = (i) => (packed[i] % 4 ? [...colours[packed[i] % 4], alpha] : [0, 0, 0, 0]);
      context.drawImage(layer(width, height, paint), 0, 0, canvas.width, canvas.height);
    }
    if (data.has_reference && get("reference").checked) {
      const codes = packed.map((byte) => byte >> 2);
      for (const region of regions) outline(context, codes, width, height, region);
    }
    const x = (at[plane.column] + 0.5) * scale;
    const y = ((plane.flip ? height - 1 - at[plane.row] : at[plane.row]) + 0.5) * scale;
    canvas.dataset.x = x;
    canvas.dataset.y = y;
    const gap = 10;
    context.beginPath();
    context.moveTo(0, y); context.lineTo(x - gap, y);
    context.moveTo(x + gap, y); context.lineTo(canvas.width, y);
    context.moveTo(x, 0); context.lineTo(x, y - gap);
    context.moveTo(x, y + gap); context.lineTo(x, canvas.height);
    context.strokeStyle = "rgb(255 255 255 / .7)";
    context.lineWidth = 1;
    context.stroke();
    context.fillStyle = "#d8dde2";
    context.font = "14px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    const [left, right, top, bottom] = plane.sides;
    context.fillText(left, 9, canvas.height / 2);
    context.fillText(right, canvas.width - 9, canvas.height / 2);
    context.fillText(top, canvas.width / 2, 10);
    context.fillText(bottom, canvas.width / 2, canvas.height - 10);
    canvas.setAttribute(
      "aria-label",
      `${name} slice ${at[plane.normal] + 1} of ${size[plane.normal]}; crosshair on ${describeCrosshair()}`,
    );
    const slider = get(name);
    slider.value = at[plane.normal];
    slider.setAttribute("aria-valuetext", `${at[plane.normal] + 1} of ${size[plane.normal]}`);
  }

  function describeCrosshair() {
    const packed = Math.round(value(volumes.labels, ...at) / 16);
    const parts = [`prediction ${names[packed % 4]}`];
    if (data.has_reference) parts.push(`reference ${names[packed >> 2]}`);
    if (volumes.uncertainty) {
      parts.push(`uncertainty ${((value(volumes.uncertainty, ...at) / 255) * data.uncertainty_top).toFixed(2)}`);
    }
    return parts.join(", ");
  }

  function all() {
    for (const name of Object.keys(planes)) draw(name);
    root.querySelector("output").textContent = `At the crosshair: ${describeCrosshair()}.`;
  }

  function go(axis, place) {
    at[axis] = Math.min(size[axis] - 1, Math.max(0, place));
    all();
  }

  async function start() {
    const wanted = { ...data.images, labels: data.labels };
    if (data.uncertainty) wanted.uncertainty = data.uncertainty;
    await Promise.all(Object.entries(wanted).map(async ([name, address]) => { volumes[name] = await decode(address); }));
    for (const [name, plane] of Object.entries(planes)) {
      const slider = get(name);
      slider.max = size[plane.normal] - 1;
      slider.addEventListener("input", () => go(plane.normal, Number(slider.value)));
      const canvas = root.querySelector(`canvas[data-plane="${name}"]`);
      const point = (event) => {
        const frame = canvas.getBoundingClientRect();
        const column = Math.floor(((event.clientX - frame.left) / frame.width) * size[plane.column]);
        const row = Math.floor(((event.clientY - frame.top) / frame.height) * size[plane.row]);
        at[plane.column] = Math.min(size[plane.column] - 1, Math.max(0, column));
        go(plane.row, plane.flip ? size[plane.row] - 1 - row : row);
      };
      canvas.addEventListener("pointerdown", point);
      canvas.addEventListener("pointermove", (event) => { if (event.buttons && event.pointerType === "mouse") point(event); });
    }
    for (const name of ["contrast", "prediction", "reference", "opacity", "uncertainty"]) {
      const control = get(name);
      if (control) control.addEventListener("input", all);
    }
    get("lesion").addEventListener("click", () => { at.splice(0, 3, ...data.start); all(); });
    root.hidden = false;
    all();
    root.dataset.ready = "true";
  }

  start();
})();
