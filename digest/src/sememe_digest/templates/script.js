(() => {
  const root = document.documentElement;
  // A browser may refuse storage to a page that is opened as a file.
  const load = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
  const save = (key, value) => { try { localStorage.setItem(key, value); } catch { /* not kept */ } };
  root.classList.add("scripted");
  if (load("theme")) root.dataset.theme = load("theme");
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    save("theme", root.dataset.theme);
  });

  const articles = [...document.querySelectorAll("article")];
  const texts = new Map(articles.map((article) => [article, article.textContent.toLowerCase()]));
  const chips = [...document.querySelectorAll(".chip[data-class]")];
  const unread = document.getElementById("unread");
  const filter = document.getElementById("filter");
  const pressed = (button) => button.getAttribute("aria-pressed") === "true";
  const press = (button, on) => button.setAttribute("aria-pressed", String(on));

  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const classes = chips.filter(pressed).map((chip) => chip.dataset.class);
    let count = 0;
    for (const article of articles) {
      const wanted = words.every((word) => texts.get(article).includes(word))
        && (!classes.length || classes.includes(article.dataset.class))
        && !(pressed(unread) && article.classList.contains("is-read"));
      article.hidden = !wanted;
      count += wanted;
    }
    document.getElementById("shown").textContent = count === articles.length ? "" : `${count} of ${articles.length}`;
  };
  filter.addEventListener("input", show);
  for (const chip of [...chips, unread]) {
    chip.addEventListener("click", () => { press(chip, !pressed(chip)); show(); });
  }

  for (const article of articles) {
    const button = article.querySelector(".read");
    const mark = (on) => { article.classList.toggle("is-read", on); press(button, on); };
    mark(load(`read ${article.id}`) === "1");
    button.addEventListener("click", () => {
      mark(!pressed(button));
      save(`read ${article.id}`, pressed(button) ? "1" : "0");
      show();
    });
  }
})();
