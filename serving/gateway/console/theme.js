// Light, dark, or as the system has it. A classic script in the head: the page must not flash in the wrong colours.
"use strict";
(() => {
  const KEY = "argosy.theme";
  const NEXT = { system: "light", light: "dark", dark: "system" };
  const MARK = { system: "◐ auto", light: "○ light", dark: "● dark" };
  let theme = "system";
  try {
    theme = localStorage.getItem(KEY) ?? theme;
  } catch {
    // storage may be forbidden: the choice lasts as long as the page
  }

  function show() {
    if (!(theme in NEXT)) theme = "system";
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = MARK[theme];
      button.setAttribute("aria-label", `Colours: ${theme}`);
    }
  }

  function turn() {
    theme = NEXT[theme];
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // as above
    }
    show();
  }

  show();
  addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", turn);
  });
})();
