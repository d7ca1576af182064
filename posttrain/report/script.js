// Points at a stage's own edges in the lineage.
for (const node of document.querySelectorAll(".lineage .node")) {
  const own = [...document.querySelectorAll(".lineage .edge")].filter((edge) => [edge.dataset.from, edge.dataset.to].includes(node.dataset.name));
  node.addEventListener("mouseenter", () => own.forEach((edge) => edge.classList.add("own")));
  node.addEventListener("mouseleave", () => own.forEach((edge) => edge.classList.remove("own")));
}

// Filters the samples by task, text and whether the models' scores differ. Without it all rows are shown.
const rows = [...document.querySelectorAll("#samples tbody tr")];
const [task, find, only, shown] = ["task", "find", "only", "shown"].map((id) => document.getElementById(id));

function show() {
  const words = find.value.toLowerCase();
  let count = 0;
  for (const row of rows) {
    const wanted =
      (!task.value || row.dataset.task === task.value) &&
      (!only.checked || row.dataset.differs === "1") &&
      row.textContent.toLowerCase().includes(words);
    row.hidden = !wanted;
    count += wanted;
  }
  shown.textContent = `${count} of ${rows.length}`;
}

if (task) {
  for (const part of [task, find, only]) part.addEventListener("input", show);
  show();
}
