// Filters: a form hides what does not match, among the elements with data-text that it governs.
for (const form of document.querySelectorAll("form.filter")) {
  const within = document.getElementById(form.dataset.of);
  const items = [...within.querySelectorAll("[data-text]")];
  const counted = items.filter((item) => item.matches("tr"));
  const matches = (item) => {
    const { family, status, text } = form.elements;
    const words = (item.dataset.text + " " + item.textContent).toLowerCase();
    return [
      [family, () => item.dataset.family === family.value],
      [status, () => item.dataset.status.split(" ").includes(status.value)],
      [text, () => text.value.toLowerCase().split(/\s+/).every((word) => words.includes(word))],
    ].every(([field, holds]) => (field?.value ? holds() : true));
  };
  const update = () => {
    for (const item of items) item.hidden = !matches(item);
    for (const head of within.querySelectorAll("tr.family")) {
      const mine = counted.filter((item) => item.dataset.family === head.dataset.of);
      head.hidden = mine.every((item) => item.hidden);
    }
    const left = counted.filter((item) => !item.hidden).length;
    form.elements.count.value = left === counted.length ? "" : `${left} of ${counted.length}`;
  };
  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("pageshow", update); // the browser may have kept what was typed
  addEventListener("hashchange", () => {
    if (within.querySelector(":target")?.hidden) { form.reset(); update(); }
  });
}
