import { SeparationError } from "./errors.js";

/** A song: an http(s) URL, or the file's content. A data URI works too, but every webhook repeats it. */
export type Song = string | URL | Blob | ArrayBuffer | Uint8Array;

/**
 * The song as a string if it is a URL, else as a Blob.
 *
 * @throws SeparationError if it is neither a URL that a server can download nor a file's content.
 */
export function urlOrFile(song: Song): string | Blob {
  const url = song instanceof URL ? song.href : song;
  if (typeof url === "string") {
    if (/^(https?:\/\/|data:)/.test(url)) return url;
    const start = JSON.stringify(url.slice(0, 100));
    throw new SeparationError(`the song is ${start}: give an http or https URL, or the file's content`, "input");
  }
  if (url instanceof Blob) return url;
  if (ArrayBuffer.isView(url) || Object.prototype.toString.call(url) === "[object ArrayBuffer]") {
    return new Blob([url as ArrayBuffer | Uint8Array<ArrayBuffer>]);
  }
  throw new SeparationError("the song is neither a URL nor a file: give a Blob, an ArrayBuffer or a Uint8Array", "input");
}

const MOST_INLINE_BYTES = 75_000_000;
const BLOCK_BYTES = 3 * 2 ** 13; // a multiple of three, so that the blocks' base64 can be joined

/**
 * A file as a data URI.
 *
 * @throws SeparationError if it is too large for Cog's server, which takes requests of up to 100 MiB.
 */
export async function dataUri(file: Blob): Promise<string> {
  if (file.size > MOST_INLINE_BYTES) {
    const size = `${Math.ceil(file.size / 1e6)} MB`;
    throw new SeparationError(`the song has ${size}, and a container takes files of up to 75 MB: give a URL`, "input");
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  const blocks: string[] = [];
  for (let start = 0; start < bytes.length; start += BLOCK_BYTES) {
    blocks.push(btoa(String.fromCharCode(...bytes.subarray(start, start + BLOCK_BYTES))));
  }
  return `data:${file.type || "application/octet-stream"};base64,${blocks.join("")}`;
}
