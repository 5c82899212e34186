import { SeparationError } from "./errors.js";

/** A song: an http(s) URL, or the file's content. A data URI works too, but every webhook repeats it. */
export type Song = string | URL | Blob | ArrayBuffer | Uint8Array;

/** The song as a string if it is a URL, else as a Blob. */
export function urlOrFile(song: Song): string | Blob {
  if (typeof song === "string" || song instanceof Blob) return song;
  return song instanceof URL ? song.href : new Blob([song as ArrayBuffer | Uint8Array<ArrayBuffer>]);
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
