// Puts the texts and paths of one version, all made beforehand, in the places that ask for them by name.
(() => {
  "use strict";
  const { start, groups, frames } = JSON.parse(document.getElementById("frames").textContent);
  const root = document.getElementById("explorer");
  const form = root.querySelector("form");
  const slider = document.getElementById("bits");
  const ticks = root.querySelector(".ticks");
  const all = (selector) => [...root.querySelectorAll(selector)];
  const texts = all("[data-text]"), paths = all("[data-path]"), members = all("[data-group]");
  let group = groups.findIndex((each) => each.frames.includes(start));

  function show() {
    const frame = frames[groups[group].frames[slider.value]];
    for (const place of texts) {
      const text = frame.texts[place.dataset.text];
      if (place.textContent !== text) place.textContent = text;
    }
    for (const place of paths) place.setAttribute("d", frame.paths[place.dataset.path]);
    [...ticks.children].forEach((tick, i) => tick.classList.toggle("on", i === +slider.value));
    root.dataset.verdict = frame.verdict;
    slider.setAttribute("aria-valuetext", frame.texts.bits);
  }

  // A slider over the versions of this group, standing where it is asked to.
  function enter(index, position) {
    group = index;
    const { scheme, frames: mine } = groups[group];
    slider.max = mine.length - 1;
    slider.value = position;
    ticks.replaceChildren(...mine.map((i) => {
      const tick = document.createElement("span");
      tick.textContent = frames[i].tick;
      return tick;
    }));
    for (const member of members) member.classList.toggle("on", +member.dataset.group === group);
    root.style.setProperty("--picked", `var(--${scheme}, var(--muted))`);
    show();
  }

  // The version of another group that has the same bits, or the nearest to them.
  function alike(index) {
    const wanted = frames[groups[group].frames[slider.value]].bits;
    const away = groups[index].frames.map((i) => Math.abs(frames[i].bits - wanted));
    return away.indexOf(Math.min(...away));
  }

  slider.addEventListener("input", show);
  form.addEventListener("change", (event) => {
    if (event.target.name === "scheme") enter(+event.target.value, alike(+event.target.value));
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  enter(group, groups[group].frames.indexOf(start));
})();
