/** npm's replicate and the client on a container outside Replicate. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import test, { before, beforeEach } from "node:test";
import Replicate, { type FileOutput } from "replicate";
import { PredictionError, Separator } from "./separation.js";
import { dataUri, idle, plain, songFile } from "./served.js";
import { startReceiver } from "./workerd.js";

const MODEL = "owner/separation:any";
let replicate: Replicate;
let separator: Separator;
let song: string;
before(async () => {
  replicate = new Replicate({ auth: "unused", baseUrl: plain() });
  separator = new Separator({ model: MODEL, auth: "unused", baseUrl: plain() });
  song = dataUri(await readFile(songFile()));
});

beforeEach(() => idle(plain()));

test("replicate.run with a version returns the stems in the order of the contract", async () => {
  const output = (await replicate.run(MODEL, { input: { audio: song, output_format: "flac" } })) as FileOutput[];
  assert.equal(output.length, 2);
  for (const file of output) {
    assert.match(file.toString(), /^data:audio\/flac;base64,/);
    assert.equal(await (await file.blob()).slice(0, 4).text(), "fLaC");
  }
});

test("predictions.create with a version returns the finished prediction", async () => {
  const input = { audio: song, output_format: "mp3", two_stems: "drums" };
  const prediction = await replicate.predictions.create({ version: "any", input });
  assert.equal(prediction.status, "succeeded");
  assert.equal(prediction.output.length, 2);
  assert.ok((prediction.metrics as Record<string, unknown>)["audio_seconds"]);
});

test("the client names the stems and reports only the end of the job", async () => {
  const shares: number[] = [];
  const onProgress = (share: number): void => void shares.push(share);
  const stems = await separator.separate(song, { stems: "all_6", output_format: "flac", onProgress });
  assert.deepEqual(Object.keys(stems), ["vocals", "drums", "bass", "guitar", "piano", "other"]);
  assert.equal(new Set(Object.values(stems)).size, 6);
  assert.deepEqual(shares, [1]);
});

test("a failed prediction is an error with the container's message", async () => {
  await assert.rejects(separator.separate(song, { chunk_size: 4, overlap: 8 }), (error) => {
    assert.ok(error instanceof PredictionError);
    assert.equal(error.status, "failed");
    assert.match(error.message, /overlap/);
    return true;
  });
  await idle(plain());
  assert.ok((await separator.separate(song)).vocals);
});

test("an input out of range is refused by name", async () => {
  await assert.rejects(separator.separate(song, { chunk_size: 99 }), /status 422 .*chunk_size/);
});

test("uploading a file to the container is an error and starts no prediction", async () => {
  // The container refuses the route before it has read the file, which may close the connection first.
  await assert.rejects(separator.separate(new Blob(["x"])), /files failed with status 404|fetch failed/);
});

test("the container's own webhooks are not signed, so the Worker refuses them", async () => {
  const receiver = await startReceiver("whsec_c2VjcmV0");
  try {
    assert.ok((await separator.separate(song, { output_format: "mp3", webhook: receiver.url })).instrumental);
    assert.deepEqual(await receiver.rows(), []);
  } finally {
    await receiver.close();
  }
});
