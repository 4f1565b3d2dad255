// The conversation: what is shown, what can be done, and in which order.
//
// Sending is a transaction: until the first word of the answer has come, whatever goes wrong puts the question back
// into the box, so that the conversation never holds a question without an answer.

const DEFAULTS = { temperature: 0.2, top_p: 0.7, max_tokens: 512 };
const SUGGESTIONS = [
  "What is unusual about this picture?",
  "What should I look out for here?",
  "Describe this picture in detail.",
];
const ONSET = 400; // ms in which a second click on Send does not stop what the first one sent

const $ = id => document.getElementById(id);
const conversation = { turns: [], draft: { text: "", pictures: [] }, editing: false };
const settings = { ...DEFAULTS, ...Object.fromEntries(Object.entries(recall("settings") ?? {}).filter(([name, value]) => name in DEFAULTS && Number.isFinite(value))) };
const shown = new WeakMap(); // turn -> its element
let models = [];
let running = null; // {controller, turn, began, kind} while an answer is on its way
let retry = null; // what "Try again" does

// ---- asking

/** Send what is in the box. */
async function send() {
  const { draft, editing, turns } = conversation;
  if (running) return say("An answer is on its way. Escape stops it.");
  if (!draft.text.trim()) {
    $("question").focus();
    return say("Type a question first.");
  }
  if (busy) return say("A picture is still being read.");
  const before = { turns, editing };
  const turn = { text: draft.text.trim(), pictures: draft.pictures };
  conversation.turns = [...(editing ? turns.slice(0, -1) : turns), turn];
  conversation.editing = false;
  setDraft({ text: "", pictures: [] });
  await run(turn, () => {
    Object.assign(conversation, before);
    const { text, pictures } = conversation.draft; // what was typed meanwhile stays, below
    setDraft({ text: text ? `${turn.text}\n${text}` : turn.text, pictures: [...turn.pictures, ...pictures] });
    $("question").focus();
    return send;
  });
}

/** Answer the last question once more. Until the new answer begins, the old one is not lost. */
async function regenerate() {
  const turn = conversation.turns.at(-1);
  if (running || !turn) return;
  const { answer } = turn;
  $("send").focus(); // the button that was pressed goes away, and this one stops the answer
  await run(turn, () => {
    turn.answer = answer;
    return regenerate;
  });
}

/**
 * Have a turn answered.
 * @param {() => Function} undo called when no answer came; gives what "Try again" does
 */
async function run(turn, undo) {
  const answer = { text: "", end: null, remark: "", first: null, rate: null, tokens: null };
  const controller = new AbortController();
  turn.answer = answer;
  running = { controller, turn, began: performance.now() };
  clearNotice();
  showAll();
  scrollToEnd();
  say("Waiting for the answer.");
  const tick = setInterval(() => showTurn(turn), 1000);
  let problem = null;
  try {
    await receive(answer, controller.signal);
    if (answer.end === "length") answer.remark = "Cut off at the longest answer set, or at the end of the model's context.";
  } catch (error) {
    problem = error;
  }
  clearInterval(tick);
  if (running?.turn !== turn) return; // a new conversation was begun meanwhile
  running = null;
  if (problem && !answer.text) failed(problem, undo());
  else finished(answer, problem);
  showAll();
  store();
}

/** Fill the answer with what comes. Seconds and rates are the reader's: they include the network. */
async function receive(answer, signal) {
  const model = await chosenModel();
  const body = { model, messages: messagesOf(conversation.turns), ...settings };
  let began, first, last, end;
  for await (const { sent, text, end: reason, usage } of ask(body, signal, askForKey)) {
    if (sent !== undefined) began = sent;
    if (text !== undefined) {
      last = performance.now();
      first ??= last;
      answer.first = (first - began) / 1000;
      answer.text += text;
      showSoon();
    }
    if (reason) end = reason;
    if (usage) answer.tokens = usage.completion_tokens;
  }
  if (answer.tokens > 1 && last > first) answer.rate = (answer.tokens - 1) / ((last - first) / 1000);
  answer.end = end ?? "stop";
}

function finished(answer, problem) {
  const stopped = problem?.name === "AbortError";
  if (problem) answer.end = stopped ? "stopped" : "broken";
  if (stopped) answer.remark = "Stopped.";
  else if (problem) answer.remark = [wordsFor(problem), problem.detail].filter(Boolean).join(" ");
  say([answer.remark, `${problem ? "What came of the answer" : "Answer"}: ${answer.text.trim() || "empty"}`].join(" "));
}

function failed(problem, again) {
  if (problem.name === "AbortError") return say("Stopped before the answer began. Your question is back in the box.");
  notify(wordsFor(problem), problem.detail, again);
}

function wordsFor(problem) {
  if (problem instanceof Refusal) return problem.message;
  console.error(problem);
  return "The server's answer could not be understood.";
}

function stop() {
  running?.controller.abort();
}

/** The last question goes back into the box, and is replaced when it is sent. */
function edit() {
  const turn = conversation.turns.at(-1);
  if (running || !turn) return;
  conversation.editing = true;
  setDraft({ text: turn.text, pictures: turn.pictures });
  showAll();
  $("question").focus();
  say("Editing your last question.");
}

function keepAsItWas() {
  conversation.editing = false;
  setDraft({ text: "", pictures: [] });
  showAll();
  $("question").focus();
}

function startAnew() {
  stop();
  running = null;
  Object.assign(conversation, { turns: [], editing: false });
  setDraft({ text: "", pictures: [] });
  clearNotice();
  showAll();
  store();
  scrollTo({ top: 0 });
  $("question").focus();
  say("New conversation.");
}

// ---- models and key

async function loadModels() {
  models = await listModels(askForKey);
  $("models").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  $("models").hidden = models.length < 2;
  $("model").hidden = models.length > 1;
  $("model").textContent = $("model").title = models[0]?.id ?? "";
  const context = Math.min(...models.map(model => model.max_model_len ?? Infinity));
  if (context < Infinity) {
    $("max_tokens").max = context;
    $("context").textContent = `Question, pictures and answer together: up to ${context.toLocaleString("en")} tokens.`;
  }
}

async function chosenModel() {
  if (!models.length) await loadModels();
  if (!models.length) throw new Refusal("The server has no model.");
  return $("models").value;
}

/** Ask the user for a key. @param {boolean} wrong whether one was sent and refused */
async function askForKey(wrong) {
  const dialog = $("key-dialog");
  if (dialog.open) return new Promise(resolve => dialog.addEventListener("close", () => resolve(Boolean(sessionKey())), { once: true }));
  $("key-why").textContent = wrong
    ? "The key was not accepted. Check it and type it again."
    : "Whoever runs the server can give you one.";
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise(resolve => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "use") return false;
  setSessionKey($("key").value);
  $("key").value = "";
  return true;
}

// ---- pictures

let busy = 0; // pictures being read

async function addPictures(files) {
  busy += 1;
  const problems = [];
  const added = [];
  for (const file of files) {
    try {
      const picture = await readPicture(file);
      conversation.draft.pictures = [...conversation.draft.pictures, picture];
      added.push(`${picture.name} added, ${sizeOf(picture)}.`);
      showDraft();
    } catch (error) {
      problems.push(error.message);
    }
  }
  busy -= 1;
  if (problems.length) notify(problems.join(" "));
  if (added.length) say(added.join(" "));
  $("question").focus();
  store();
}

function removePicture(picture) {
  conversation.draft.pictures = conversation.draft.pictures.filter(other => other !== picture);
  showDraft();
  store();
  $("question").focus();
  say(`${picture.name} removed.`);
}

function look(picture) {
  const image = $("viewer").querySelector("img");
  image.src = picture.url;
  image.alt = picture.name;
  $("viewer").showModal();
}

async function useExample({ picture, question }) {
  if (running) return;
  setDraft({ text: question, pictures: [await readPicture(fileFrom(picture, "example.png"))] });
  await send();
}

// ---- showing

function showAll() {
  const { turns, editing } = conversation;
  $("welcome").hidden = turns.length > 0;
  $("turns").hidden = turns.length === 0;
  $("save").disabled = turns.length === 0 || Boolean(running);
  const elements = turns.map(elementOf);
  for (const element of [...$("turns").children]) if (!elements.includes(element)) element.remove();
  for (const element of elements) if (!element.isConnected) $("turns").append(element);
  turns.forEach(showTurn);
  $("editing").hidden = !editing;
  showSend();
  showDraft();
}

function elementOf(turn) {
  if (!shown.has(turn)) shown.set(turn, makeTurn(turn));
  return shown.get(turn);
}

function makeTurn(turn) {
  const element = $("turn-template").content.firstElementChild.cloneNode(true);
  const part = name => element.querySelector(name);
  part(".asked .text").textContent = turn.text;
  part(".pictures").replaceChildren(...turn.pictures.map(pictureElement));
  part(".pictures").hidden = turn.pictures.length === 0;
  part(".edit").onclick = edit;
  part(".again").onclick = regenerate;
  part(".copy").onclick = event => copy(turn.answer.text.trim(), event.currentTarget);
  return element;
}

function pictureElement(picture) {
  const element = $("picture-template").content.firstElementChild.cloneNode(true);
  const button = element.querySelector("button");
  showImage(button, picture);
  element.querySelector(".size").textContent = shrinkage(picture);
  return element;
}

function shrinkage({ url, shrunk }) {
  if (!url) return "Not kept when the page was reloaded: there was no room. Add it again to ask about it.";
  return shrunk ? "Kept smaller when the page was reloaded." : "";
}

function showImage(button, picture) {
  const image = button.querySelector("img");
  if (picture.url) image.src = picture.url;
  image.alt = picture.name;
  image.width = picture.width;
  image.height = picture.height;
  button.disabled = !picture.url;
  button.setAttribute("aria-label", `View ${picture.name}`);
  button.onclick = () => look(picture);
}

function showTurn(turn) {
  const element = elementOf(turn);
  const part = name => element.querySelector(name);
  const { answer } = turn;
  const active = running?.turn === turn;
  const last = conversation.turns.at(-1) === turn && !running;
  element.classList.toggle("replaced", conversation.editing && last);
  element.classList.toggle("broken", answer.end === "broken");
  part(".answer").setAttribute("aria-busy", active);
  showText(part(".answer .text"), answer.text);
  part(".waiting").hidden = !active || answer.text !== "";
  if (active && !answer.text) part(".waiting").textContent = waitingWords(turn);
  part(".remark").textContent = answer.remark || (!active && !answer.text.trim() ? "The model gave an empty answer." : "");
  part(".actions").hidden = active && !answer.text;
  part(".copy").hidden = active || !answer.text.trim();
  part(".again").hidden = part(".edit").hidden = !last || conversation.editing;
  part(".figures").textContent = figuresOf(answer);
}

function waitingWords({ pictures }) {
  const seconds = Math.floor((performance.now() - running.began) / 1000);
  const what = pictures.length ? "Looking" : "Thinking";
  return seconds < 2 ? what : `${what}, ${seconds} s`;
}

function figuresOf({ first, rate, tokens }) {
  const parts = [
    tokens !== null && `${tokens} token${tokens === 1 ? "" : "s"}`,
    rate !== null && `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`,
    first !== null && `first token ${first < 10 ? first.toFixed(2) : first.toFixed(1)} s`,
  ];
  return parts.filter(Boolean).map(part => part.replaceAll(" ", "\u00a0")).join(" · "); // lines break between them
}

let drawing = false;

/** Show the running answer before the next paint, once, however many tokens come until then. */
function showSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    if (!running) return;
    showTurn(running.turn);
  });
}

function showSend() {
  const label = running ? "Stop" : "Send";
  $("send").setAttribute("aria-label", label);
  $("send").title = running ? "Stop (Esc)" : "Send";
  $("send").classList.toggle("stops", Boolean(running));
  $("send").querySelector("use").setAttribute("href", running ? "#icon-stop" : "#icon-send");
  for (const button of $("examples").querySelectorAll("button")) button.disabled = Boolean(running);
}

function setDraft(draft) {
  conversation.draft = draft;
  showDraft();
}

function showDraft() {
  const { text, pictures } = conversation.draft;
  if ($("question").value !== text) $("question").value = text;
  $("attached").replaceChildren(...pictures.map(attachedElement));
  $("attached").hidden = pictures.length === 0;
  $("begin").hidden = pictures.length > 0;
  $("suggestions").hidden = pictures.length === 0 || text !== "";
  $("question").placeholder = conversation.turns.length ? "Ask another question" : "Ask about a picture";
  grow();
}

function attachedElement(picture) {
  const element = $("attached-template").content.firstElementChild.cloneNode(true);
  showImage(element.querySelector(".look"), picture);
  element.querySelector(".title").textContent = picture.name;
  element.querySelector(".size").textContent = shrinkage(picture) || sizeOf(picture);
  const remove = element.querySelector(".remove");
  remove.setAttribute("aria-label", `Remove ${picture.name}`);
  remove.title = "Remove";
  remove.onclick = () => removePicture(picture);
  return element;
}

/** The box is as high as its text, up to what the style sheet allows. */
function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

// ---- saying: to screen readers through the status, to everybody through the notice

function say(words) {
  $("status").textContent = "";
  requestAnimationFrame(() => { $("status").textContent = words; }); // the same words twice are said twice
}

/** @param {Function} [again] what "Try again" does; without it there is no such button */
function notify(what, detail = "", again = null) {
  retry = again;
  $("notice").hidden = false;
  $("notice-what").textContent = what;
  $("notice-detail").textContent = detail;
  $("retry").hidden = !again;
}

function clearNotice() {
  retry = null;
  $("notice").hidden = true;
  $("notice-what").textContent = $("notice-detail").textContent = "";
}

async function copy(text, button) {
  const label = button.querySelector("span");
  const done = await copied(text);
  label.textContent = done ? "Copied" : "Could not copy";
  say(`${label.textContent}.`);
  setTimeout(() => { label.textContent = "Copy"; }, 2000);
}

/** Browsers have a clipboard on https and localhost only; the old way works on the others. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    const focused = document.activeElement;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

// ---- scrolling: the page follows what grows while its end is in view

let following = true;

function atEnd() {
  const { scrollTop, scrollHeight, clientHeight } = document.scrollingElement;
  return scrollHeight - clientHeight - scrollTop < 60;
}

function scrollToEnd() {
  following = true;
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
}

function onScroll() {
  following = atEnd();
  $("newest").hidden = following || conversation.turns.length === 0;
}

function onGrowth() {
  document.documentElement.style.setProperty("--foot", `${$("foot").offsetHeight}px`);
  if (following && conversation.turns.length) scrollToEnd();
}

// ---- settings

function showSettings() {
  for (const name of Object.keys(DEFAULTS)) {
    $(name).value = settings[name];
    const output = document.querySelector(`output[for="${name}"]`);
    if (output) output.value = settings[name].toFixed(2);
  }
  $("key-set").hidden = !sessionKey();
}

function changeSetting({ target }) {
  if (!(target.id in DEFAULTS) || !target.validity.valid) return;
  settings[target.id] = target.valueAsNumber;
  remember("settings", settings);
  const output = document.querySelector(`output[for="${target.id}"]`);
  if (output) output.value = settings[target.id].toFixed(2);
}

function showTheme() {
  $("theme").setAttribute("aria-pressed", isDark());
}

// ---- start

function store() {
  if (!storeConversation(conversation)) say("This conversation is too large to outlast a reload. Save keeps it.");
}

function onKey(event) {
  const box = $("question");
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) return stop();
  if (event.target !== box || event.isComposing) return;
  const phone = matchMedia("(pointer: coarse)").matches; // there Enter is a new line, and the button sends
  if (event.key === "Enter" && !event.shiftKey && !phone) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !box.value && !conversation.draft.pictures.length && conversation.turns.length) {
    event.preventDefault();
    edit();
  }
}

function onFiles(event, data) {
  const files = [...data.files];
  if (files.length) {
    event.preventDefault();
    addPictures(files);
  } else if (event.type === "drop") {
    event.preventDefault();
    notify("That was not a file. Save the picture on your device and add it from there.");
  }
}

function listen() {
  $("composer").onsubmit = event => {
    event.preventDefault();
    if (!running) send();
    else if (performance.now() - running.began > ONSET) stop();
  };
  $("question").oninput = () => {
    conversation.draft.text = $("question").value;
    $("suggestions").hidden = conversation.draft.pictures.length === 0 || conversation.draft.text !== "";
    grow();
  };
  addEventListener("keydown", onKey);
  $("keep").onclick = keepAsItWas;
  $("new").onclick = startAnew;
  $("save").onclick = () => saveConversation(conversation.turns, $("models").value || null, settings);
  $("theme").onclick = () => { toggleTheme(); showTheme(); };
  systemIsDark.onchange = showTheme;
  $("retry").onclick = () => retry?.();
  $("dismiss").onclick = () => { clearNotice(); $("question").focus(); };
  $("newest").onclick = () => { scrollToEnd(); $("question").focus(); };

  $("settings").onclick = () => { showSettings(); $("settings-dialog").showModal(); };
  $("settings-dialog").oninput = changeSetting;
  $("defaults").onclick = () => { Object.assign(settings, DEFAULTS); remember("settings", null); showSettings(); };
  $("forget").onclick = () => { setSessionKey(null); showSettings(); };
  $("no-key").onclick = () => $("key-dialog").close();

  $("pick").onclick = () => $("files").click();
  $("shoot").onclick = () => $("camera").click();
  for (const input of [$("files"), $("camera")]) {
    input.onchange = async () => {
      await addPictures([...input.files]);
      input.value = ""; // the same file can be chosen again
    };
  }
  addEventListener("paste", event => onFiles(event, event.clipboardData));
  addEventListener("drop", event => { document.body.classList.remove("dropping"); onFiles(event, event.dataTransfer); });
  addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("dropping"); });
  addEventListener("dragleave", event => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
  addEventListener("scroll", onScroll, { passive: true });
  addEventListener("resize", grow);
  addEventListener("pagehide", store);
  const observer = new ResizeObserver(onGrowth);
  for (const part of [$("turns"), $("foot")]) observer.observe(part);
}

function makeExamples() {
  for (const example of JSON.parse($("examples-data").textContent)) {
    const element = $("example-template").content.firstElementChild.cloneNode(true);
    element.querySelector("img").src = example.picture;
    element.querySelector("img").alt = example.description;
    element.querySelector("span").textContent = example.question;
    element.querySelector("button").onclick = () => useExample(example);
    $("examples").append(element);
  }
  for (const words of SUGGESTIONS) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = words;
    button.onclick = () => { setDraft({ ...conversation.draft, text: words }); send(); };
    item.append(button);
    $("suggestions").append(item);
  }
}

document.addEventListener("DOMContentLoaded", async () => {
  Object.assign(conversation, storedConversation());
  makeExamples();
  listen();
  showTheme();
  showAll();
  if (conversation.turns.length) scrollToEnd();
  if (!matchMedia("(pointer: coarse)").matches) $("question").focus(); // on a phone it would open the keyboard
  try {
    await loadModels();
  } catch (error) {
    notify(wordsFor(error), error.detail);
  }
});
