// A model's text as DOM nodes. It is text and stays text: nothing in it can become an element.

/** Paragraphs and fenced code: [{kind: "prose"|"code", text}]. A fence that is still open runs to the end. */
function blocksOf(text) {
  const blocks = [];
  for (const [index, part] of text.split(/^```[^\n`]*(?:\n|$)/m).entries()) {
    const code = index % 2 === 1;
    const pieces = code ? [part.replace(/\n$/, "")] : part.split(/\n\s*\n/);
    for (const piece of pieces) if (piece.trim()) blocks.push({ kind: code ? "code" : "prose", text: piece });
  }
  return blocks;
}

/** Make the element show the text. Blocks that have not changed stay as they are: a selection in them survives. */
function showText(element, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, index) => {
    const shown = element.children[index];
    if (shown?.block?.kind === block.kind && shown.block.text === block.text) return;
    const made = block.kind === "code" ? codeElement(block.text) : proseElement(block.text);
    made.block = block;
    if (shown) shown.replaceWith(made);
    else element.append(made);
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}

function codeElement(text) {
  const pre = document.createElement("pre");
  pre.tabIndex = 0; // wide code scrolls, and must be reachable with the keyboard for that
  const code = document.createElement("code");
  code.textContent = text;
  pre.append(code);
  return pre;
}

function proseElement(text) {
  const paragraph = document.createElement("p"); // line breaks are kept by white-space: pre-wrap
  for (const [index, piece] of text.trim().split(/`([^`\n]+)`/).entries()) {
    if (index % 2 === 0) {
      paragraph.append(piece);
    } else {
      const code = document.createElement("code");
      code.textContent = piece;
      paragraph.append(code);
    }
  }
  return paragraph;
}
