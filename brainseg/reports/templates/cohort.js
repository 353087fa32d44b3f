// Sorts the cards and the table of a cohort, hides the cases that need no look, enlarges pictures.
const body = document.querySelector("#rows"), cases = document.querySelector("#cases");
const heads = [...document.querySelectorAll("th[data-key]")];
const sorts = [...document.querySelectorAll(".bar button")];
function sort(key, down) {
  const order = (a, b) => {
    const x = JSON.parse(a.dataset.row)[key], y = JSON.parse(b.dataset.row)[key];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  };
  for (const place of [body, cases]) place.append(...[...place.children].sort(order));
  for (const head of heads)
    head.setAttribute("aria-sort",
      head.dataset.key !== key ? "none" : down ? "descending" : "ascending");
  for (const button of sorts)
    button.setAttribute("aria-pressed", button.dataset.key === key);
}
for (const head of heads)
  head.firstChild.onclick = () =>
    sort(head.dataset.key, head.getAttribute("aria-sort") === "ascending");
for (const button of sorts)
  button.onclick = () => sort(button.dataset.key, button.dataset.down === "1");
document.querySelector("#look").onchange = (event) =>
  document.body.classList.toggle("only-look", event.target.checked);
const large = document.querySelector("#large");
for (const card of cases.children)
  card.onclick = (event) => {
    event.preventDefault();
    const picture = card.querySelector("img");
    large.querySelector("b").textContent = picture.alt;
    Object.assign(large.querySelector("img"), { src: picture.src, alt: picture.alt });
    large.querySelector("p").textContent =
      [card.querySelector("span").textContent.trim(), card.title].filter(Boolean).join("; ");
    large.querySelector("a").href = card.getAttribute("href");
    large.showModal();
  };
large.onclick = ({ target }) => { // the row, or anywhere beside the picture
  if (target === large || target.tagName === "A") large.close();
};
