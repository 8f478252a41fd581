(() => {
  "use strict";
  const table = document.querySelector("table[data-sortable]");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const status = document.querySelector("[data-status]");

  // Rows with an unknown value have an empty key and come last in both orders.
  function order(column, numeric, sign) {
    return (one, other) => {
      const a = one.cells[column].dataset.key, b = other.cells[column].dataset.key;
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true }));
    };
  }

  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const first = head.dataset.first;
      const other = first === "ascending" ? "descending" : "ascending";
      const wanted = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", wanted);
      rows.sort(order(column, head.dataset.kind === "number", wanted === "ascending" ? 1 : -1));
      body.append(...rows);
    });
  });

  const text = document.querySelector("[data-filter=text]");
  const flag = document.querySelector("[data-filter=flag]");
  function filter() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const held = row.dataset.text.toLowerCase();
      const flags = row.dataset.flags.split(" ").filter(Boolean);
      const fits = !flag || !flag.value || (flag.value === "*" ? flags.length > 0 : flags.includes(flag.value));
      row.hidden = !(fits && words.every((word) => held.includes(word)));
      shown += row.hidden ? 0 : 1;
    }
    status.textContent = `${shown} of ${rows.length} cases shown.`;
  }
  text.addEventListener("input", filter);
  if (flag) flag.addEventListener("input", filter);
  document.querySelector("[data-controls]").hidden = false;
  filter();
})();
