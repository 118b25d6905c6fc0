"use strict";

// Each gallery: the line between teacher and student, and which student is shown.
const views = JSON.parse(document.getElementById("views").textContent);

document.querySelectorAll(".gallery").forEach((gallery, number) => {
  const controls = gallery.querySelector(".controls");
  if (!controls) return;
  controls.hidden = false;

  const sliders = [...gallery.querySelectorAll(".compare input")];
  function cut(slider, value) {
    slider.value = value;
    slider.parentElement.style.setProperty("--cut", `${value}%`);
  }
  for (const slider of sliders) {
    slider.addEventListener("input", () => cut(slider, slider.value));
  }
  gallery.querySelector(".all-lines").addEventListener("input", (event) => {
    for (const slider of sliders) cut(slider, event.target.value);
  });

  const select = gallery.querySelector("select");
  if (!select) return;
  const students = [...gallery.querySelectorAll("img.student")];
  const first = select.querySelector("[selected]").value;
  const sources = { ...views[number], [first]: students.map((image) => image.src) };
  function show() {
    const view = select.value;
    const label = select.selectedOptions[0].dataset.label;
    students.forEach((image, index) => {
      image.src = sources[view][index];
      image.alt = label + image.alt.slice(image.alt.indexOf(":"));
    });
    for (const each of gallery.querySelectorAll(".label.student")) each.textContent = label;
    for (const note of gallery.querySelectorAll(".verdict")) {
      note.textContent = JSON.parse(note.dataset.notes)[view];
    }
  }
  select.addEventListener("change", show);
  // A browser may remember an earlier choice.
  show();
});

// The values under the pointer, or under the arrow keys.
for (const plot of document.querySelectorAll(".plot")) {
  const series = JSON.parse(plot.dataset.series);
  const places = [...new Set(series.flatMap((line) => line.points.map((p) => p[0])))];
  places.sort((a, b) => a - b);
  if (!places.length) continue;
  const cursor = plot.querySelector(".cursor");
  const reading = plot.closest(".chart").querySelector(".reading");
  const svg = plot.querySelector("svg");
  let at = -1;

  function read(index) {
    at = Math.max(0, Math.min(places.length - 1, index));
    const near = series.filter((line) => line.points.length).map((line) => {
      const point = line.points.reduce((best, p) =>
        Math.abs(p[0] - places[at]) < Math.abs(best[0] - places[at]) ? p : best);
      return { name: line.name, where: point[2], value: point[3] };
    });
    cursor.hidden = false;
    const [inner, outer] = [svg.getBoundingClientRect(), plot.getBoundingClientRect()];
    cursor.style.left = `${inner.left - outer.left + inner.width * places[at] / 100}px`;
    const first = near[0].where;
    const label = /^[\d,]+$/.test(first) ? `step ${first}` : first;
    reading.textContent = `${label}: ` + near.map((n) => `${n.name} ${n.value}`).join(", ");
  }

  function hide() {
    cursor.hidden = true;
    reading.textContent = "";
    at = -1;
  }

  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = 100 * (event.clientX - box.left) / box.width;
    let best = 0;
    places.forEach((p, index) => {
      if (Math.abs(p - place) < Math.abs(places[best] - place)) best = index;
    });
    read(best);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    read(at < 0 ? (step > 0 ? 0 : places.length - 1) : at + step);
  });
}
