/** The key and the settings: in this tab's storage, or in the browser's where the user wants them to stay. */

const KEY = "llm-service-key";
const SETTINGS = "llm-service-settings";
const THEME = "llm-service-theme";
const DRAFT = "llm-service-draft";
const MODEL = "llm-service-model";

const isKept = () => localStorage.getItem(KEY) !== null;
const place = () => (isKept() ? localStorage : sessionStorage);

export const store = {
  get key() {
    return place().getItem(KEY);
  },

  get kept() {
    return isKept();
  },

  /** Store the key; the settings go with it. */
  keep(key, kept) {
    const settings = place().getItem(SETTINGS);
    this.forget();
    const where = kept ? localStorage : sessionStorage;
    where.setItem(KEY, key);
    if (settings) where.setItem(SETTINGS, settings);
  },

  forget() {
    for (const each of [localStorage, sessionStorage]) {
      each.removeItem(KEY);
      each.removeItem(SETTINGS);
    }
  },

  get settings() {
    try {
      return JSON.parse(place().getItem(SETTINGS)) ?? {};
    } catch {
      return {};
    }
  },

  set settings(value) {
    place().setItem(SETTINGS, JSON.stringify(value));
  },

  get theme() {
    return localStorage.getItem(THEME) ?? "auto";
  },

  set theme(value) {
    localStorage.setItem(THEME, value);
  },

  /** The model that was chosen in this tab; empty: the default one. */
  get model() {
    return sessionStorage.getItem(MODEL) ?? "";
  },

  set model(name) {
    sessionStorage.setItem(MODEL, name);
  },

  /** What is typed and has no answer yet survives a reload of this tab. */
  get draft() {
    return sessionStorage.getItem(DRAFT) ?? "";
  },

  set draft(text) {
    sessionStorage.setItem(DRAFT, text);
  },
};

/** The code of a link such as /#key=..., which is taken out of the address at once; null where there is none. */
export function codeOfLink() {
  const found = /^#key=(.+)$/.exec(location.hash);
  if (!found) return null;
  history.replaceState(null, "", location.pathname + location.search);
  try {
    return decodeURIComponent(found[1]);
  } catch {
    return null;
  }
}
