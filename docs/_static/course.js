/* Small comforts: buttons that copy code, a story that is told again, edges that fade where there is
   more, and a word on the search. */
(() => {
  "use strict";

  async function copy(text) {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text);
      return;
    }
    const area = document.createElement("textarea"); // over plain http there is no clipboard
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("refused");
  }

  /* What to type: of an example in a docstring the lines that are typed, without their prompts. */
  function typed(text) {
    const lines = text.replace(/\n+$/, "").split("\n");
    if (!lines.some((line) => line.startsWith(">>> "))) return lines.join("\n");
    return lines
      .filter((line) => /^(>>>|\.\.\.)( |$)/.test(line))
      .map((line) => line.slice(4))
      .join("\n");
  }

  function addCopyButtons() {
    for (const block of document.querySelectorAll("article div.highlight")) {
      if (block.closest(".cell_output")) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        try {
          await copy(typed(block.querySelector("pre").textContent));
          button.textContent = "Copied";
        } catch {
          button.textContent = "Not allowed";
        }
        setTimeout(() => (button.textContent = "Copy"), 1500);
      });
      block.append(button);
    }
  }

  function letStoryBeTold() {
    const story = document.querySelector("figure.story");
    if (!story) return;
    const button = story.querySelector("button");
    button.hidden = false;
    button.addEventListener("click", () => {
      const text = story.querySelector("p");
      text.replaceWith(text.cloneNode(true)); // its animations begin anew
    });
  }

  function explainSearch() {
    const results = document.getElementById("search-results");
    if (!results || location.protocol !== "file:") return;
    const note = document.createElement("p");
    note.className = "search-note";
    note.append(
      "Opened as a file, the search finds pages but cannot show the lines that match. ",
      "Over http it shows them: ",
    );
    const command = document.createElement("code");
    command.textContent = "python -m http.server --directory build/docs";
    note.append(command, ", then open http://localhost:8000.");
    results.before(note);
  }

  /* On a phone code and figures are scrolled sideways, and nothing shows where there is more. */
  function markWhatIsScrolled() {
    const kinds = ":is(.cell_output, pre, .formula, .table-wrapper, p:has(> img))";
    const look = (box) => {
      const scrolls = getComputedStyle(box).overflowX !== "visible";
      const left = box.scrollWidth - box.clientWidth - box.scrollLeft;
      box.classList.toggle("more", scrolls && left > 2);
    };
    const observer = new ResizeObserver((seen) => seen.forEach((one) => look(one.target)));
    for (const box of document.querySelectorAll(`article ${kinds}`)) {
      box.addEventListener("scroll", () => look(box), { passive: true });
      observer.observe(box);
    }
  }

  addCopyButtons();
  markWhatIsScrolled();
  letStoryBeTold();
  explainSearch();
})();
