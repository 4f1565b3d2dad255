// What outlives a reload, in this tab alone: the conversation, the draft and the key; and the conversation as a file.
//
// A turn is {text, pictures, answer}; an answer is {text, end, remark, first, rate, tokens}: how it ended (OpenAI's
// finish_reason, or "stopped", "broken", null while it runs), words about that, seconds to the first token, tokens a
// second after it, and tokens.

// Characters for whole pictures, and whether the others are kept small. Browsers give a tab about five million in all.
const ATTEMPTS = [[4_000_000, true], [1_500_000, true], [0, true], [0, false]];

/**
 * Store the conversation. The newest pictures are stored whole; those that no longer fit, as a smaller copy; where even
 * that is too much, only their names.
 * @returns {boolean} whether it could be stored at all
 */
function storeConversation(conversation) {
  for (const [room, keepSpares] of ATTEMPTS) {
    try {
      sessionStorage.setItem("llava_fast.conversation", JSON.stringify(pack(conversation, room, keepSpares)));
      return true;
    } catch { /* no room: try with less */ }
  }
  return false;
}

function pack({ turns, draft, editing }, room, keepSpares) {
  const packed = picture => {
    const { url, spare } = picture;
    if (url !== spare && (room -= url.length) >= 0) return picture;
    return { ...picture, url: keepSpares ? spare : null, spare: null, shrunk: picture.shrunk || url !== spare };
  };
  const newestFirst = pictures => pictures.toReversed().map(packed).toReversed();
  const packedDraft = { ...draft, pictures: newestFirst(draft.pictures) };
  const packedTurns = turns.toReversed().map(turn => ({ ...turn, pictures: newestFirst(turn.pictures) })).toReversed();
  return { turns: packedTurns, draft: packedDraft, editing };
}

/** The stored conversation, or null. An answer that was cut short by the reload says so; a question that had none yet
 * goes back into the draft. */
function storedConversation() {
  try {
    const found = JSON.parse(sessionStorage.getItem("llava_fast.conversation"));
    const last = found.turns.at(-1);
    if (last?.answer.end === null && last.answer.text) {
      Object.assign(last.answer, { end: "broken", remark: "The page was reloaded in the middle of this answer." });
    } else if (last?.answer.end === null) {
      const { text, pictures } = found.turns.pop();
      if (!found.draft.text && !found.draft.pictures.length) found.draft = { text, pictures };
    }
    for (const { pictures } of [found.draft, ...found.turns]) for (const picture of pictures) picture.spare ??= picture.url;
    return found;
  } catch {
    return null;
  }
}

function sessionKey() {
  try {
    return sessionStorage.getItem("llava_fast.key") ?? sessionKey.here;
  } catch {
    return sessionKey.here;
  }
}

function setSessionKey(key) {
  sessionKey.here = key;
  try {
    if (key) sessionStorage.setItem("llava_fast.key", key);
    else sessionStorage.removeItem("llava_fast.key");
  } catch { /* then it is kept until the page is left */ }
}

/** The turns as OpenAI's messages: what is sent, and what is saved. */
function messagesOf(turns) {
  return turns.flatMap(({ text, pictures, answer }) => {
    const images = pictures.filter(picture => picture.url).map(({ url }) => ({ type: "image_url", image_url: { url } }));
    const content = images.length ? [...images, { type: "text", text }] : text;
    const question = { role: "user", content };
    return answer.end === null ? [question] : [question, { role: "assistant", content: answer.text.trim() }];
  });
}

/** Hand the conversation to the user as a file. */
function saveConversation(turns, model, settings) {
  const saved = {
    saved: new Date().toISOString(),
    model,
    settings,
    messages: messagesOf(turns),
    answers: turns.map(({ answer: { end, first, rate, tokens } }) => ({
      finish_reason: end, seconds_to_first_token: first, tokens_per_second: rate, completion_tokens: tokens,
    })),
  };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(saved, null, 1)], { type: "application/json" }));
  link.download = `conversation-${saved.saved.slice(0, 19).replaceAll(":", "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
