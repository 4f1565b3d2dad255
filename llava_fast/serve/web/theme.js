"use strict";

// Runs in <head>, before anything is painted: a chosen theme never flashes the other one first.
// Without a choice the page follows the system.

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemIsDark.matches;
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

/** To the other theme; where that is the system's own, the choice is forgotten and the page follows the system again. */
function toggleTheme() {
  const dark = !isDark();
  const theme = dark === systemIsDark.matches ? null : dark ? "dark" : "light";
  setTheme(theme);
  remember("theme", theme);
}

// ---- what outlives the tab: the theme and the settings. A browser may forbid storage: then nothing is remembered.

function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`llava_fast.${name}`);
    else localStorage.setItem(`llava_fast.${name}`, JSON.stringify(value));
  } catch { /* the page works without */ }
}

function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(`llava_fast.${name}`));
  } catch {
    return null;
  }
}

setTheme(["dark", "light"].find(theme => theme === recall("theme")));
