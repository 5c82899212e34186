/** What the tests that need the container get from their starter: where it answers, and songs. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";

function given(name: string): string {
  const value = process.env[name];
  assert.ok(value, `${name} is not set: pytest starts these tests, together with the container`);
  return value;
}

/** The container by itself, http://127.0.0.1:port. */
export const plain = (): string => given("PLAIN_CONTAINER");
/** The container that uploads its stems to http://127.0.0.1:{gatewayPort}/upload. */
export const uploading = (): string => given("UPLOADING_CONTAINER");
export const gatewayPort = (): number => Number(given("GATEWAY_PORT"));
/** FLAC files, of two seconds and of ninety. */
export const songFile = (): string => given("SONG");
export const longSongFile = (): string => given("LONG_SONG");

/** Waits for the container's one place: an answer comes a little before it is free again. */
export async function idle(container: string): Promise<void> {
  for (;;) {
    const health = (await (await fetch(`${container}/health-check`)).json()) as { status: string };
    if (health.status === "READY") return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

export function dataUri(bytes: Buffer): string {
  return `data:audio/flac;base64,${bytes.toString("base64")}`;
}

/** The sha256 of what a stem's URL gives, by the stem's name. */
export async function contents(stems: Record<string, string>): Promise<Record<string, string>> {
  const hashes: Record<string, string> = {};
  for (const [name, url] of Object.entries(stems)) {
    const response = await fetch(url);
    assert.equal(response.status, 200);
    hashes[name] = createHash("sha256").update(new Uint8Array(await response.arrayBuffer())).digest("hex");
  }
  return hashes;
}

/** The checksum of a FLAC stem's samples, as its header has it, by the stem's name: its tags hold the song's file name. */
export async function samples(stems: Record<string, string>): Promise<Record<string, string>> {
  const checksums: Record<string, string> = {};
  for (const [name, url] of Object.entries(stems)) {
    const flac = Buffer.from(await (await fetch(url)).arrayBuffer());
    assert.equal(flac.toString("latin1", 0, 4), "fLaC");
    checksums[name] = flac.toString("hex", 26, 42);
  }
  return checksums;
}
