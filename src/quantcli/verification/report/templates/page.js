"use strict";
// Shows what a mark of a chart is: by pointer, by touch, and by arrow keys in a chart that has the focus.
// Without it browsers show the titles of marks.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  for (const title of document.querySelectorAll("svg.chart > * > title")) {
    title.parentNode.setAttribute("data-tip", title.textContent);
    title.remove();
  }

  let shown = null;

  function show(mark) {
    if (shown) shown.classList.remove("shown");
    shown = mark;
    tip.hidden = !mark;
    if (!mark) return;
    mark.classList.add("shown");
    tip.textContent = mark.getAttribute("data-tip");
    const place = mark.getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    const left = Math.min(Math.max(place.left + place.width / 2 - tip.offsetWidth / 2, 4), wide - tip.offsetWidth - 4);
    const above = place.top - tip.offsetHeight - 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above < 0 ? place.bottom + 8 : above) + scrollY}px`;
  }

  // the nearest mark in the direction of an arrow key
  function next(chart, key) {
    const marks = [...chart.querySelectorAll("[data-tip]")];
    if (!shown || !chart.contains(shown)) return marks[0];
    const across = key === "ArrowLeft" || key === "ArrowRight";
    const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
    const middle = (mark) => {
      const box = mark.getBoundingClientRect();
      return [box.left + box.width / 2, box.top + box.height / 2];
    };
    const [x, y] = middle(shown);
    let best = shown;
    let least = Infinity;
    for (const mark of marks) {
      const [dx, dy] = [middle(mark)[0] - x, middle(mark)[1] - y];
      const [ahead, aside] = across ? [sign * dx, dy] : [sign * dy, dx];
      const distance = ahead + 4 * Math.abs(aside);
      if (ahead > 0.5 && distance < least) [best, least] = [mark, distance];
    }
    return best;
  }

  // a page that scrolls below a pointer at rest sends this event, too: it must not end what keys show
  let rest = [-1, -1];
  document.addEventListener("pointerover", (event) => {
    const moved = Math.hypot(event.clientX - rest[0], event.clientY - rest[1]) >= 1;
    if (moved) show(event.target.closest("[data-tip]"));
    rest = [event.clientX, event.clientY];
  });
  document.addEventListener("pointerdown", (event) => show(event.target.closest("[data-tip]")));
  document.addEventListener("focusout", () => show(null));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(null);
    const chart = document.activeElement.closest("svg.chart");
    if (!chart || !event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const mark = next(chart, event.key);
    if (!mark) return;
    mark.scrollIntoView({ block: "nearest", inline: "nearest" });
    show(mark);
  });
})();
