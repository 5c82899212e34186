/** The containers and songs that pytest provides for the tests. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";

function given(name: string): string {
  const value = process.env[name];
  assert.ok(value, `${name} is not set: pytest starts these tests, together with the container`);
  return value;
}

/** A container outside Replicate, http://127.0.0.1:port. */
export const plain = (): string => given("PLAIN_CONTAINER");
/** A container that uploads its stems to http://127.0.0.1:{gatewayPort}/upload. */
export const uploading = (): string => given("UPLOADING_CONTAINER");
/** The log of the container outside Replicate. */
export const plainLog = (): string => given("PLAIN_LOG");
/** The checkout that these tests belong to. */
export const project = (): string => given("PROJECT");
export const gatewayPort = (): number => Number(given("GATEWAY_PORT"));
/** FLAC files of two and ninety seconds. */
export const songFile = (): string => given("SONG");
export const longSongFile = (): string => given("LONG_SONG");

/** Polls until something is found. */
export async function until<T>(look: () => T | undefined | Promise<T | undefined>): Promise<T> {
  for (const end = Date.now() + 60_000; Date.now() < end; ) {
    const found = await look();
    if (found !== undefined) return found;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error("it did not happen within a minute");
}

export function dataUri(bytes: Buffer): string {
  return `data:audio/flac;base64,${bytes.toString("base64")}`;
}

/** The sha256 of each stem's file, by the stem's name. */
export async function contents(stems: Record<string, string>): Promise<Record<string, string>> {
  const hashes: Record<string, string> = {};
  for (const [name, url] of Object.entries(stems)) {
    const response = await fetch(url);
    assert.equal(response.status, 200);
    hashes[name] = createHash("sha256").update(new Uint8Array(await response.arrayBuffer())).digest("hex");
  }
  return hashes;
}

/** The MD5 of each FLAC stem's samples, from its header. (The tags differ: they have the song's file name.) */
export async function samples(stems: Record<string, string>): Promise<Record<string, string>> {
  const checksums: Record<string, string> = {};
  for (const [name, url] of Object.entries(stems)) {
    const flac = Buffer.from(await (await fetch(url)).arrayBuffer());
    assert.equal(flac.toString("latin1", 0, 4), "fLaC");
    checksums[name] = flac.toString("hex", 26, 42);
  }
  return checksums;
}
