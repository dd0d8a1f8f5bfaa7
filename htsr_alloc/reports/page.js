// Sorts and filters the tables of class "data". Without it the page shows them as they are.
"use strict";

const value = (cell) => {
  const number = parseFloat(cell.textContent.replace("−", "-"));
  return Number.isNaN(number) ? null : number;
};

const sortBy = (table, column, descending) => {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const numeric = !table.tHead.rows[0].cells[column].classList.contains("name");
  rows.sort((a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]];
    if (!numeric) {
      const order = x.textContent.localeCompare(y.textContent, "en", { numeric: true });
      return descending ? -order : order;
    }
    const [p, q] = [value(x), value(y)];
    if (p === null || q === null) return (p === null) - (q === null); // no value: last
    return descending ? q - p : p - q;
  });
  body.append(...rows);
};

for (const table of document.querySelectorAll("table.data")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    });
  });

  const filter = document.createElement("input");
  const count = document.createElement("span");
  filter.type = "search";
  filter.placeholder = "filter rows";
  filter.setAttribute("aria-label", "filter rows");
  count.setAttribute("role", "status");
  const rows = [...table.tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      shown += !row.hidden;
    });
    count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
  });
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append(filter, " ", count);
  table.parentElement.before(tools);
}
