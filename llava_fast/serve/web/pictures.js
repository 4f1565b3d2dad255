// Pictures: from a file of any size to what is sent. Everything goes through a canvas: the picture is turned upright
// (EXIF), reduced, laid on white where it is transparent, and loses its metadata (where it was taken, with what).

const LONGEST = 1024; // pixels of the longer side that is sent: three times what LLaVA's vision tower looks at
const SPARE = 448; // pixels of the smaller copy that is stored when the tab's storage has no room for the whole one
const MOST_BYTES = 64 * 1024 * 1024; // of a file; more than any phone makes
const MOST_LOSSLESS = 1_500_000; // characters of a PNG; longer ones are sent as JPEG

/**
 * A picture ready to be sent.
 * @param {File} file
 * @returns {Promise<{name: string, url: string, spare: string, width: number, height: number, from: number[]|null}>}
 *   url and spare are data URIs; from is the size before it was reduced.
 * @throws {Error} with words for the user.
 */
async function readPicture(file) {
  const name = file.name || "picture";
  if (file.type && !file.type.startsWith("image/")) throw new Error(`${name} is not a picture.`);
  if (file.size > MOST_BYTES) {
    throw new Error(`${name} has ${Math.round(file.size / 2 ** 20)} MB; pictures of up to ${MOST_BYTES / 2 ** 20} MB can be added.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${name} cannot be read as a picture by this browser. Save it as JPEG or PNG and add that.`);
  }
  const drawn = [draw(bitmap, LONGEST), draw(bitmap, SPARE)];
  const [whole, spare] = drawn;
  const reduced = whole.width !== bitmap.width || whole.height !== bitmap.height;
  const from = reduced ? [bitmap.width, bitmap.height] : null;
  bitmap.close();
  const url = encode(whole, !reduced && file.type !== "image/jpeg");
  const small = spare.width === whole.width ? url : encode(spare, false);
  return { name, url, spare: small, width: whole.width, height: whole.height, from };
}

function draw(bitmap, longest) {
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function encode(canvas, lossless) {
  const png = lossless ? canvas.toDataURL("image/png") : null;
  return png && png.length <= MOST_LOSSLESS ? png : canvas.toDataURL("image/jpeg", 0.92);
}

/** The file behind a data URI of this page, such as an example's picture. */
function fileFrom(dataUri, name) {
  const [head, body] = dataUri.split(",");
  const bytes = Uint8Array.from(atob(body), letter => letter.charCodeAt(0));
  return new File([bytes], name, { type: head.slice("data:".length, head.indexOf(";")) });
}

/** "1024 × 768", or what it was reduced to. */
function sizeOf({ width, height, from }) {
  return `${from ? "reduced to " : ""}${width} × ${height}`;
}
