(() => {
  "use strict";
  const csrf = document.querySelector("meta[name=csrf]")?.content ?? "";
  const find = (id) => document.getElementById(id);

  async function ask(method, path, body) {
    const headers = { "x-csrf-token": csrf };
    const isFile = body instanceof Blob;
    if (body !== undefined && !isFile) headers["content-type"] = "application/json";
    if (isFile) headers["content-type"] = "application/octet-stream";
    const sent = isFile || body === undefined ? body : JSON.stringify(body);
    let answer = await fetch(`/api/v1${path}`, { method, headers, body: sent });
    for (let turn = 0; answer.status === 429 && turn < 60 && path.endsWith("/complete"); turn++) {
      await new Promise((resolve) => setTimeout(resolve, 2000));
      answer = await fetch(`/api/v1${path}`, { method, headers, body: sent });
    }
    if (answer.status === 401) {
      location.assign("/sign-in");
      throw new Error("You are no longer signed in.");
    }
    const text = await answer.text();
    const content = text ? JSON.parse(text) : null;
    if (!answer.ok) throw new Error(content?.detail ?? `The server answered ${answer.status}.`);
    return content;
  }

  // ---- sending files

  const form = find("upload");
  if (form) {
    form.hidden = false;
    let chosen = [];
    let upload = null;
    const status = find("upload-status");
    const recognised = find("recognised");

    const say = (text, isProblem = false) => {
      status.textContent = text;
      status.classList.toggle("problem", isProblem);
    };

    const busy = (is) => {
      for (const control of form.querySelectorAll("button, input, select")) control.disabled = is;
    };

    async function send(files) {
      chosen = files.filter((one) => one.file.size > 0);
      if (!chosen.length) return say("There are no files.", true);
      recognised.hidden = true;
      busy(true);
      try {
        if (upload) await ask("DELETE", `/uploads/${upload.id}`).catch(() => null);
        upload = null;
        const announced = chosen.map((one) => ({
          name: one.name,
          bytes: one.file.size,
          contrast: one.contrast ?? null,
        }));
        const made = await ask("POST", "/uploads", { files: announced });
        upload = made;
        for (const [number, one] of chosen.entries()) {
          say(`Sending file ${number + 1} of ${chosen.length}.`);
          await ask("PUT", `/uploads/${made.id}/files/${number}`, one.file);
        }
        say("The files have arrived. Checking them.");
        upload = await ask("POST", `/uploads/${made.id}/complete`);
        show();
      } catch (error) {
        say(error.message, true);
      } finally {
        busy(false);
      }
    }

    function lines(cell, texts) {
      if (!texts.length) return;
      const list = document.createElement("ul");
      for (const text of texts) {
        const item = document.createElement("li");
        item.textContent = text;
        list.append(item);
      }
      cell.append(list);
    }

    function show() {
      if (upload.state === "refused") return say(upload.message, true);
      const body = recognised.querySelector("tbody");
      body.replaceChildren();
      for (const one of upload.cases) {
        const row = body.insertRow();
        const head = document.createElement("th");
        head.scope = "row";
        head.textContent = one.name;
        row.append(head);
        lines(row.insertCell(), Object.entries(one.contrasts).map(([contrast, name]) => `${contrast}: ${name}`));
        const missing = one.missing.length ? [`missing: ${one.missing.join(", ")}`] : [];
        lines(row.insertCell(), [...missing, ...one.problems, ...one.warnings, ...one.notes]);
      }
      const usable = upload.cases.filter((one) => !one.problems.length);
      find("start").disabled = !usable.length;
      const doubtful = upload.cases.length === 1 && (upload.cases[0].missing.length || upload.cases[0].problems.length);
      ask_contrasts(doubtful && chosen.length <= 8);
      recognised.hidden = false;
      const count = upload.cases.length;
      say(`${count} ${count === 1 ? "case was" : "cases were"} recognised; ${usable.length} can be predicted.`);
      find("recognised-head").focus();
    }

    function ask_contrasts(wanted) {
      const place = find("assign");
      place.hidden = !wanted;
      const fields = place.querySelector(".fields");
      fields.replaceChildren();
      if (!wanted) return;
      const taken = Object.fromEntries(Object.entries(upload.cases[0].contrasts).map(([c, name]) => [name, c]));
      for (const [number, one] of chosen.entries()) {
        const label = document.createElement("label");
        label.htmlFor = `contrast-${number}`;
        label.textContent = one.name;
        const select = document.createElement("select");
        select.id = label.htmlFor;
        for (const contrast of ["", "t1", "t1c", "t2", "flair"]) {
          select.append(new Option(contrast || "not one of them", contrast, false, taken[one.name] === contrast));
        }
        fields.append(label, select);
      }
    }

    find("again").addEventListener("click", () => {
      const selects = [...find("assign").querySelectorAll("select")];
      send(chosen.map((one, number) => ({ ...one, contrast: selects[number].value || null })));
    });

    find("discard").addEventListener("click", async () => {
      try {
        if (upload) await ask("DELETE", `/uploads/${upload.id}`);
        say("Discarded.");
      } catch (error) {
        say(error.message, true);
      }
      upload = null;
      recognised.hidden = true;
      for (const id of ["files", "folder"]) find(id).value = "";
      find("files").focus();
    });

    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (!upload) return;
      busy(true);
      try {
        const options = { tta: find("tta").checked, save_probabilities: find("save_probabilities").checked };
        if (find("prepare").checked) options.prepare = true;
        const cases = upload.cases.filter((one) => !one.problems.length).map((one) => one.number);
        await ask("POST", "/jobs", { upload: upload.id, model: find("model").value, options, cases });
        location.assign("/jobs");
      } catch (error) {
        say(error.message, true);
        busy(false);
      }
    });

    const named = (files) => [...files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
    for (const id of ["files", "folder"]) {
      find(id).addEventListener("change", () => find(id).files.length && send(named(find(id).files)));
    }

    // A dropped folder is a tree of entries.
    async function walk(entry, path) {
      if (entry.isFile) {
        const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
        return [{ file, name: path + file.name }];
      }
      const reader = entry.createReader();
      const found = [];
      for (;;) {
        const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
        if (!some.length) return found;
        for (const one of some) found.push(...(await walk(one, `${path}${entry.name}/`)));
      }
    }

    const drop = find("drop");
    for (const kind of ["dragenter", "dragover"]) {
      drop.addEventListener(kind, (event) => {
        event.preventDefault();
        drop.classList.add("over");
      });
    }
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", async (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
      const found = [];
      for (const entry of entries) found.push(...(await walk(entry, "")));
      send(found.length ? found : named(event.dataTransfer.files));
    });
  }

  // ---- the queue, live

  const table = find("jobs");
  const single = find("job");
  const now = (job) => (job.place ? `place ${job.place}` : job.step || job.message);

  function update(job) {
    if (single && single.dataset.job === job.id) {
      if (single.dataset.state !== job.state) return location.reload();
      single.querySelector(".now").textContent = now(job);
    }
    const row = table?.querySelector(`[data-job="${job.id}"]`);
    if (!row) return;
    const state = row.querySelector(".state");
    if (state.textContent !== job.state) find("live").textContent = `${job.name}: ${job.state}`;
    state.className = `state ${job.state}`;
    state.textContent = job.state;
    row.querySelector(".now").textContent = now(job);
  }

  if (table || single) {
    const events = new EventSource("/api/v1/events");
    events.addEventListener("jobs", (event) => JSON.parse(event.data).forEach(update));
  }
})();
