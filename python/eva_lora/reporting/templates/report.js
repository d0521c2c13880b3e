"use strict";
(() => {
  const table = document.getElementById("table"), body = table.tBodies[0], rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  const valueOf = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent;
    const number = Number(text);
    return text.trim() === "" || Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const sign = ascending ? 1 : -1;
    rows.sort((a, b) => sign * compare(valueOf(a, column), valueOf(b, column)));
    body.append(...rows);
  }));

  const filter = document.getElementById("filter"), which = document.getElementById("which");
  const count = document.getElementById("count");
  const apply = () => {
    const text = filter.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const named = row.cells[0].textContent.toLowerCase().includes(text);
      const chosen = !which.value || row.dataset.state.split(" ").includes(which.value);
      row.hidden = !(named && chosen);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} layers`;
  };
  filter.addEventListener("input", apply);
  which.addEventListener("change", apply);

  const pick = key => {
    for (const chart of document.querySelectorAll("figure svg")) {
      let found = false;
      for (const line of chart.querySelectorAll(".line[data-key]")) {
        const picked = key !== null && line.dataset.key.split(" ").includes(key);
        line.classList.toggle("picked", picked);
        found ||= picked;
      }
      chart.classList.toggle("picking", found);
    }
    for (const row of rows) row.classList.toggle("picked", row.dataset.key === key);
  };
  const follow = () => {
    const match = /^#layer-(\d+)$/.exec(location.hash);
    if (match) {
      const row = document.getElementById(`layer-${match[1]}`);
      if (row?.hidden) { filter.value = which.value = ""; apply(); row.scrollIntoView(); }
    }
    pick(match ? match[1] : null);
  };
  body.addEventListener("click", event => {
    const row = event.target.closest("tr");
    pick(row.classList.contains("picked") ? null : row.dataset.key);
  });
  window.addEventListener("hashchange", follow);
  follow();
})();
