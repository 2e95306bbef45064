// Draws a form for each route of the description, and shows what the server answers.

const description = await (await fetch("openapi.json")).json();
const token = document.getElementById("token");
const main = document.getElementById("routes");

// An element with text or children in it. Texts are never read as HTML.
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function resolve(schema) {
  const path = schema?.$ref?.slice(2).split("/") ?? [];
  return path.reduce((place, key) => place[key], path.length ? description : schema);
}

// What stands in the body's field at first.
function example(content) {
  const schema = content.schema ?? {};
  const given = content.example ?? resolve(schema)?.example;
  if (given !== undefined) return given;
  return schema.type === "array" ? [resolve(schema.items)?.example ?? {}] : {};
}

function form(method, path, operation) {
  const fields = (operation.parameters ?? []).map((parameter) => {
    const input = element("input", { required: parameter.required ?? false });
    const about = element("small", {}, parameter.description ?? "");
    return { parameter, input, label: element("label", {}, parameter.name, input, about) };
  });
  const contents = operation.requestBody?.content;
  const plain = "application/json";
  const kinds = Object.keys(contents ?? {}).sort((one, other) => (other === plain) - (one === plain));
  const kind = element("select", {}, ...kinds.map((name) => element("option", {}, name)));
  const body = element("textarea", { spellcheck: false });
  const fill = () => { body.value = JSON.stringify(example(contents[kind.value]), null, 2); };
  kind.addEventListener("change", fill);
  if (contents) fill();
  const answer = element("pre", { hidden: true });
  const send = element("button", {}, "Send");
  const made = element("form", {}, element("p", {}, operation.description ?? ""), ...fields.map((field) => field.label));
  if (contents) made.append(element("label", {}, "Content type", kind), element("label", {}, "Body", body));
  made.append(send, answer);
  made.addEventListener("submit", async (event) => {
    event.preventDefault();
    const headers = new Headers();
    if (token.value) headers.set("Authorization", `Bearer ${token.value.trim()}`);
    if (contents) headers.set("Content-Type", kind.value);
    const query = new URLSearchParams();
    let filled = path;
    for (const { parameter, input } of fields) {
      if (input.value === "") continue;
      if (parameter.in === "path") filled = filled.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
      if (parameter.in === "query") query.set(parameter.name, input.value);
      if (parameter.in === "header") headers.set(parameter.name, input.value);
    }
    const address = `.${filled}${query.size ? `?${query}` : ""}`;
    answer.hidden = false;
    try {
      const response = await fetch(address, { method: method.toUpperCase(), headers, body: contents ? body.value : undefined });
      const text = await response.text();
      let shown = text;
      try { shown = JSON.stringify(JSON.parse(text), null, 2); } catch { /* It is no JSON. */ }
      const links = response.headers.get("Link");
      answer.textContent = `${response.status} ${response.statusText}${links ? `\nLink: ${links}` : ""}\n\n${shown}`;
    } catch (error) {
      answer.textContent = String(error);
    }
  });
  return made;
}

for (const tag of description.tags) {
  main.append(element("h2", {}, tag.name), element("p", {}, tag.description ?? ""));
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      if (!operation.tags?.includes(tag.name)) continue;
      const name = element("code", {}, `${method.toUpperCase()} ${path}`);
      const made = element("details", {}, element("summary", {}, name, operation.summary ?? ""));
      // Drawn when it is first looked at.
      made.addEventListener("toggle", () => made.append(form(method, path, operation)), { once: true });
      main.append(made);
    }
  }
}
