// The page: a client of /v1/chat/completions. What anyone wrote becomes text nodes, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
let messages = [];   // the conversation, as the API takes it
let pictures = [];   // data: URLs for the next message
let running = null;  // AbortController of the answer being written
let models = [];

function add(parent, tag, kind, text = "") {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  parent.append(element);
  return element;
}

function addPicture(parent, url) {
  if (!url.startsWith("data:image/")) return;
  const image = document.createElement("img");
  image.src = url;
  image.alt = "picture";
  parent.append(image);
}

function chosen() {
  return models.find((model) => model.id === $("model").value);
}

function showAbilities() {
  $("files").hidden = !chosen().sees;
  $("tools").replaceChildren(...chosen().tools.map((name) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = name;
    label.append(box, ` ${name} `);
    return label;
  }));
}

function reset() {
  running?.abort();
  messages = [];
  clearPictures();
  $("talk").replaceChildren();
}

function clearPictures() {
  pictures = [];
  $("files").value = "";
  $("pictures").replaceChildren();
}

async function* events(response) {
  // Server-sent events, which may be cut anywhere in transit, also within a character.
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function answer() {
  const box = add($("talk"), "div", "assistant");
  const talk = messages;  // "New conversation" may put another in its place
  const shown = {};
  let content = "";
  running = new AbortController();
  $("stop").hidden = false;
  $("send").disabled = true;
  try {
    const enabled = [...$("tools").querySelectorAll("input:checked")].map((input) => input.value);
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: $("model").value, messages: talk, stream: true, enabled_tools: enabled }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const [kind, text] of Object.entries(event.choices[0].delta)) {
        if (kind === "picture") addPicture(box, text);
        else if (kind !== "role" && text) {
          const name = kind === "content" ? "text" : kind;
          shown[name] ??= add(box, "div", name);
          shown[name].append(text);
          if (kind === "content") content += text;
        }
      }
      $("talk").scrollTop = $("talk").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") add(box, "div", "error", error.message);
  }
  if (content || !box.querySelector(".error")) talk.push({ role: "assistant", content });
  else talk.pop();  // a message that got no answer: the API wants them in turn
  running = null;
  $("stop").hidden = true;
  $("send").disabled = false;
  $("words").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = $("words").value.trim();
  if (!words || running) return;
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  messages.push({ role: "user", content: parts.length ? [...parts, { type: "text", text: words }] : words });
  const box = add($("talk"), "div", "user");
  pictures.forEach((url) => addPicture(box, url));
  add(box, "div", "text", words);
  $("words").value = "";
  clearPictures();
  answer();
});

$("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});

$("files").addEventListener("change", async () => {
  for (const file of $("files").files) {
    const url = await new Promise((resolve) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.readAsDataURL(file);
    });
    pictures.push(url);
    addPicture($("pictures"), url);
  }
});

$("stop").addEventListener("click", () => running?.abort());
$("reset").addEventListener("click", reset);
$("model").addEventListener("change", () => { reset(); showAbilities(); });

fetch("/v1/models").then((response) => response.json()).then((list) => {
  models = list.data;
  $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  showAbilities();
});
