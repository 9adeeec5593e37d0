// What a shape's <title> says, in a box at the pointer, or where a finger taps; without this script browsers show titles their own way.
// A figure takes the keyboard: arrow keys go from shape to shape, Escape hides the box.
(() => {
  const tip = document.getElementById("tip");
  let shown = null;
  const hide = () => { shown?.classList.remove("shown"); shown = null; tip.hidden = true; };
  const show = (shape, x, y) => {
    if (shape !== shown) { hide(); shown = shape; shape.classList.add("shown"); }
    tip.textContent = shape.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18) + "px";
  };
  const middle = (shape) => {
    const box = shape.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const next = (from, shapes, [dx, dy]) => {
    // The nearest shape in the arrow's direction; what lies off to the side counts as farther.
    const [x, y] = middle(from);
    let best = null, least = Infinity;
    for (const shape of shapes) {
      const [a, b] = middle(shape), along = (a - x) * dx + (b - y) * dy, aside = Math.abs((a - x) * dy + (b - y) * dx);
      const far = along + 3 * aside;
      if (shape !== from && along > 0.5 && far < least) { best = shape; least = far; }
    }
    return best ?? from;
  };
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  for (const figure of document.querySelectorAll("svg.figure")) {
    const shapes = [];
    for (const title of figure.querySelectorAll("title")) {
      const shape = title.parentNode;
      shape.dataset.tip = title.textContent;
      title.remove();
      shapes.push(shape);
    }
    if (!shapes.length) continue;
    figure.tabIndex = 0;
    const point = (event) => {
      const shape = event.target.closest("[data-tip]");
      if (shape) show(shape, event.clientX, event.clientY); else hide();
    };
    figure.addEventListener("pointermove", point);
    figure.addEventListener("click", point);  // of a tap nothing else comes after the finger has left
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      if (!(event.key in arrows)) return;
      event.preventDefault();
      const mine = shown && figure.contains(shown);
      const shape = mine ? next(shown, shapes, arrows[event.key]) : shapes[0];
      show(shape, ...middle(shape));
    });
  }
  addEventListener("scroll", hide, { passive: true, capture: true });
})();
