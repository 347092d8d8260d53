"use strict";
const groups = [...document.querySelectorAll("details[data-change]")];
const buttons = [...document.querySelectorAll("button[data-show]")];
const search = document.querySelector("input[type=search]");
let shown = "all";
function update() {
  const wanted = search ? search.value.toLowerCase() : "";
  let count = 0;
  for (const group of groups) {
    const change = Number(group.dataset.change);
    const fits = shown === "all" || (shown === "better" ? change > 0 : change < 0);
    group.hidden = !(fits && (!wanted || group.textContent.toLowerCase().includes(wanted)));
    count += !group.hidden;
  }
  const text = document.querySelector("#count");
  if (text) text.textContent = `${count} of ${groups.length} prompts`;
}
for (const button of buttons) {
  button.addEventListener("click", () => {
    shown = button.dataset.show;
    for (const other of buttons) other.setAttribute("aria-pressed", other === button);
    update();
  });
}
if (search) search.addEventListener("input", update);
update();
